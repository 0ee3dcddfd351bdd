"""Quantized checkpoints by the ``quant_method`` of their config: which tensors are one weight together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.compiler.packing.encodings.awq import find_awq
from moec.compiler.packing.encodings.compressed import find_compressed
from moec.compiler.packing.encodings.errors import missing, unreadable
from moec.compiler.packing.encodings.fp8 import fp8_in_blocks
from moec.compiler.packing.encodings.ggml import ggml_weights
from moec.compiler.packing.encodings.gptq import find_gptq
from moec.compiler.packing.encodings.mxfp4 import BLOCK, mxfp4
from moec.compiler.packing.encodings.record import Encoded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moec.compiler.checkpoint.record import TensorEntry

    Finder = Callable[[Mapping[str, TensorEntry], Mapping[str, Any]], dict[str, Encoded]]

FP8_SCALE = "_scale_inv"
MXFP4_CODES, MXFP4_SCALES = "_blocks", "_scales"


def encoded_weights(index: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, Encoded]:
    """The quantized weights of a checkpoint, by the name that they would have unquantized.

    Raises:
        UnsupportedModelError: the checkpoint is quantized in a way that moec does not read.
        CheckpointError: the parts of a weight do not fit each other.
    """
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method not in METHODS:
        known = ", ".join(name for name in METHODS if name)
        raise unreadable(f"with {method}", REFUSED.get(method, f"moec reads {known}."))
    return METHODS[method](index, quantization)


def _fp8_and_mxfp4(index: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> dict[str, Encoded]:
    """DeepSeek-V3's ``<name>_scale_inv`` and gpt-oss's ``<name>_blocks`` and ``<name>_scales``, whatever the config."""
    block = quantization.get("weight_block_size")
    size = (int(block[0]), int(block[1])) if block else None
    found: dict[str, Encoded] = {}
    for name, entry in index.items():
        scale = index.get(f"{name}{FP8_SCALE}")
        if entry.dtype == "F8_E4M3" and scale is None and quantization:
            raise missing(f"{name}{FP8_SCALE}", name)
        if entry.dtype == "F8_E4M3" and scale is not None:
            found[name] = Encoded(
                fp8_in_blocks(name, entry, scale, size), entry.shape, (name, f"{name}{FP8_SCALE}")
            )
        base = name.removesuffix(MXFP4_CODES)
        if base != name and f"{base}{MXFP4_SCALES}" in index:
            encoding = mxfp4(base, entry, index[f"{base}{MXFP4_SCALES}"])
            shape = (*entry.shape[:-2], entry.shape[-2] * BLOCK)
            found[base] = Encoded(encoding, shape, (name, f"{base}{MXFP4_SCALES}"), turned=True)
    return found


METHODS: dict[str | None, Finder] = {
    None: _fp8_and_mxfp4,
    "fp8": _fp8_and_mxfp4,
    "mxfp4": _fp8_and_mxfp4,
    "gguf": ggml_weights,
    "gptq": find_gptq,
    "awq": find_awq,
    "compressed-tensors": find_compressed,
}
"""By ``quant_method``, None where there is none."""

REFUSED: dict[str | None, str] = {
    "bitsandbytes": (
        "Its codes run over the flattened matrix and stand for a table of values (NF4) or leave columns out (int8): "
        "no format of moec says that, and it was rounded without calibration, as --quantization int4 does."
    ),
}
"""Why what has no entry in `METHODS` has none, where there is more to say than what is read instead."""
