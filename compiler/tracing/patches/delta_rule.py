"""Layers of the gated delta rule: Qwen3-Next and Qwen3.5, and with a decay for each channel Kimi and Bailing."""

from __future__ import annotations

from moec.compiler.tracing.patches.record import MODELS, OUTSIDE, Patch
from moec.compiler.tracing.patches.recurrences import causal_convolution, gated_delta_rule

_RULES = {
    "qwen3_next": "torch_chunk_gated_delta_rule",
    "qwen3_5_moe": "torch_chunk_gated_delta_rule",
    "glm5_next": "chunk_kimi_delta_attention",
    "kimi_linear": "chunk_kimi_delta_attention",
    "bailing_hybrid": "chunk_kimi_delta_attention",
}

PATCHES = tuple(
    Patch(f"{MODELS}.{name}.modeling_{name}", target, replacement, OUTSIDE)
    for name, rule in _RULES.items()
    for target, replacement in (("causal_conv1d_fn", causal_convolution), (rule, gated_delta_rule))
)
