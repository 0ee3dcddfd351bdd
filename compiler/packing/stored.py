"""The checkpoint's tensors as they count: a quantized weight and its scales are one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from moec.compiler.checkpoint.gguf.blocks import SAME_FORMATS
from moec.compiler.checkpoint.record import STORED_BYTES, TensorEntry
from moec.errors import CheckpointError, UnsupportedModelError
from moec.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Mapping

MXFP4_BLOCK = 32
"""Values that share one scale in OCP's MX formats."""

Encoding: TypeAlias = Literal["plain", "fp8", "mxfp4", "ggml"]

_READABLE_METHODS = ("fp8", "mxfp4", "gguf")


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint, dequantized when read.

    A weight in FP8 has one float scale a block of ``block`` rows and columns, ragged at the edges (the
    ``weight_scale_inv`` of DeepSeek-V3). MXFP4 (OCP MX 1.0) has two 4-bit values a byte and one power of two
    for each 32 values of a row. GGML's blocks have all in one tensor.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    entry: TensorEntry
    scale: TensorEntry | None
    block: tuple[int, int]
    """Rows and columns that share a scale, or rows that have to be read together."""

    def item(self, number: int) -> Stored:
        """Slice ``number`` along the first dimension, e.g. one expert of a fused tensor."""
        scale = None if self.scale is None else self.scale.item(number)
        return replace(self, shape=self.shape[1:], entry=self.entry.item(number), scale=scale)

    def unflatten(self, count: int) -> Stored:
        """``[count * n, ...]`` as ``[count, n, ...]``; itself where it cannot be: its shape is found wrong later."""
        if self.encoding != "plain" or not self.shape or self.shape[0] % count:
            return self
        shape = (count, self.shape[0] // count, *self.shape[1:])
        return replace(self, shape=shape, entry=replace(self.entry, shape=shape))

    @property
    def format(self) -> str | None:
        """The name of the format that says the same, bit for bit; None where there is none.

        FP8 has a scale for 128 columns there: blocks must be as wide as that or a multiple of it, or as the matrix.
        """
        if self.encoding == "plain":
            return None
        if self.encoding == "mxfp4":
            return "mxfp4"
        if self.encoding == "ggml":
            return SAME_FORMATS.get(self.entry.dtype)
        wide = self.block[1]
        return "fp8-e4m3" if wide % FORMATS["fp8-e4m3"].group == 0 or wide >= self.columns else None

    @property
    def rows(self) -> int:
        """Rows that can be read apart: all dimensions but the last, or of a vector its elements."""
        return self.shape[0] if len(self.shape) == 1 else math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Values in a row."""
        return self.shape[-1] if len(self.shape) > 1 else 1


def stored_tensors(index: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, Stored]:
    """Every tensor by its name; MXFP4's ``<name>_blocks`` and ``<name>_scales`` are one, ``<name>``.

    Raises:
        UnsupportedModelError: the checkpoint is quantized in a way that moec does not read.
        CheckpointError: a scale's shape does not fit its weight's.
    """
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method is not None and method not in _READABLE_METHODS:
        raise UnsupportedModelError(
            f"The checkpoint is quantized with {method}.",
            f"moec reads unquantized weights and {', '.join(_READABLE_METHODS)}.",
            "Use the unquantized checkpoint of this model.",
        )
    block = quantization.get("weight_block_size")
    result: dict[str, Stored] = {}
    for name, entry in index.items():
        if _is_part(name, index):
            continue
        scale = index.get(f"{name}_scale_inv")
        if entry.dtype == "F8_E4M3" and scale is not None:
            result[name] = _fp8(name, entry, scale, block)
        else:
            encoding: Encoding = "plain" if entry.dtype in STORED_BYTES else "ggml"
            result[name] = Stored(name, entry.shape, encoding, entry, None, (max(entry.paired_rows, 1), 1))
    for name, entry in index.items():
        base = name.removesuffix("_blocks")
        if base != name and f"{base}_scales" in index:
            result[base] = _mxfp4(base, entry, index[f"{base}_scales"])
    return result


def _is_part(name: str, index: Mapping[str, TensorEntry]) -> bool:
    """Whether this tensor is only a part of another one."""
    if name.endswith("_scale_inv"):
        weight = index.get(name.removesuffix("_scale_inv"))
        return weight is not None and weight.dtype == "F8_E4M3"
    for own, other in (("_blocks", "_scales"), ("_scales", "_blocks")):
        if name.endswith(own) and name.removesuffix(own) + other in index:
            return True
    return False


def _fp8(name: str, entry: TensorEntry, scale: TensorEntry, block: Any) -> Stored:
    if len(entry.shape) < 2:
        raise _misfit(name, entry, scale, "a matrix")
    *batch, rows, columns = entry.shape
    whole = math.prod(scale.shape) == math.prod(batch)
    size = (rows, columns) if whole or not block else (int(block[0]), int(block[1]))
    grid = (-(-rows // size[0]), -(-columns // size[1]))
    if math.prod(scale.shape) != math.prod(batch) * grid[0] * grid[1] or scale.dtype not in _SCALE_TYPES:
        raise _misfit(name, entry, scale, f"floating point {(*batch, *grid)}")
    return Stored(name, entry.shape, "fp8", entry, replace(scale, shape=(*batch, *grid)), size)


_SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")


def _mxfp4(name: str, blocks: TensorEntry, scales: TensorEntry) -> Stored:
    values = 2 * blocks.shape[-1] if blocks.shape else 0
    if len(blocks.shape) < 3 or values != MXFP4_BLOCK or blocks.dtype != "U8":
        raise _misfit(name, blocks, scales, "blocks of 16 bytes")
    if scales.shape != blocks.shape[:-1] or STORED_BYTES[scales.dtype] != 1:
        raise _misfit(name, blocks, scales, f"one byte a block, {blocks.shape[:-1]}")
    shape = (*blocks.shape[:-2], blocks.shape[-2] * MXFP4_BLOCK)
    return Stored(name, shape, "mxfp4", blocks, scales, (1, MXFP4_BLOCK))


def _misfit(name: str, weight: TensorEntry, scale: TensorEntry, expected: str) -> CheckpointError:
    return CheckpointError(
        f"The scales of {name} do not fit it: weight {weight.dtype} {list(weight.shape)}, "
        f"scales {scale.dtype} {list(scale.shape)}.",
        f"Expected {expected}.",
        "Download the checkpoint again, or use the unquantized one.",
    )
