"""What the library of ``cpu_kernels`` holds; a machine without the compiler has to know it too."""

from __future__ import annotations

from moec.artifacts.model import AttentionSpec, ExpertBody

LEVELS = {"x86-64": 4, "x86-64-v3": 8, "x86-64-v4": 16, "x86-64-v4-vnni": 16, "x86-64-v4-bf16": 16}
"""Instruction sets, and float32 values in a vector of each."""
READ_FLOATS = 1 << 27
FMA_STEPS = 1 << 16
TASKS = 256
SUMS = 12
LINEAR_ROWS, LINEAR_COLUMNS = 65536, 2048
FORMATS = ("bfloat16", "int4-g32", "int4-g128", "int4-g32-z", "int8-g128", "fp8-e4m3", "mxfp4")
"""Of the experts."""
ATTENTIONS = (
    AttentionSpec("gqa", 32, 8, 128, 128, 0.09, 0, 0, 0.0, False, False, "bfloat16", None),
    AttentionSpec("mla", 16, 1, 576, 512, 0.09, 0, 0, 0.0, False, True, "bfloat16", None),
)


def expert_body(kind: str) -> ExpertBody:
    """DeepSeek-V2-Lite's experts in a format."""
    swiglu = ("mul", ("silu", "gate"), "up")
    quantized = None if kind == "bfloat16" else kind
    return ExpertBody(kind.replace("-", "_"), 2048, 1408, True, False, False, swiglu, "bfloat16", quantized)
