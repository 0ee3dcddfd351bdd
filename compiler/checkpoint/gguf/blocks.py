"""The block types of GGML: which can be read, what blocks mean, and which formats say the same."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.compiler.checkpoint.gguf.header import gguf_package
from moec.compiler.checkpoint.record import STORED_BYTES
from moec.errors import UnsupportedModelError
from moec.formats import Quantized

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from moec.compiler.checkpoint.record import TensorEntry

SAME_FORMATS: dict[str, str] = {"Q4_0": "int4-g32", "Q8_0": "int8-g32", "MXFP4": "mxfp4"}
"""Block types -> the format that says the same, bit for bit."""

SCALE_BYTES = {"Q4_0": 2, "Q8_0": 2, "MXFP4": 1}
"""At the beginning of a block of 32 values."""


def check_types(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """See that every tensor's type can be read.

    Raises:
        UnsupportedModelError: one cannot; the message names it and some of its tensors.
    """
    named: dict[str, list[str]] = defaultdict(list)
    for name, entry in tensors.items():
        if entry.dtype not in STORED_BYTES:
            named[entry.dtype].append(name)
    for kind, names in named.items():
        try:
            dequantize_blocks(kind, np.zeros((1, _block(kind)[1]), np.uint8))
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{path} has {len(names)} tensors of type {kind}: {', '.join(names[:5])}.",
                f"The gguf package cannot dequantize it: {error}.",
                "Use a file of this model in another type, such as Q4_K_M or Q8_0.",
            ) from error


def dequantize_blocks(kind: str, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Float32 ``[n, K]`` of rows of blocks ``[n, K / block * bytes]``, as the gguf package has it."""
    gguf = gguf_package()
    values: NDArray[np.float32] = gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])
    return values


def block_codes(kind: str, rows: NDArray[np.uint8]) -> Quantized:
    """Codes and scales of rows of blocks whose type is in `SAME_FORMATS`, as they are.

    A block of 32 values has its scale in front; with codes of 4 bits, byte j of 16 has value j in its low half and
    value j + 16 in its high one.
    """
    size, length = _block(kind)
    blocks = rows.reshape(len(rows), -1, length)
    front = SCALE_BYTES[kind]
    scales: NDArray[Any] = np.ascontiguousarray(blocks[:, :, :front])
    codes: NDArray[Any] = blocks[:, :, front:]
    if length - front == size:
        codes = np.ascontiguousarray(codes).view(np.int8)
    else:
        codes = np.concatenate((codes & 15, codes >> 4), -1)
    scales = scales.view(np.float16) if front == 2 else scales
    return Quantized(codes.reshape(len(rows), -1), scales.reshape(len(rows), -1))


def _block(kind: str) -> tuple[int, int]:
    """Values and bytes of a block."""
    gguf = gguf_package()
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(values), int(size)
