"""The block types of GGML: which can be read, and what blocks mean."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from moec.compiler.checkpoint.gguf.codes import CARRIED
from moec.compiler.checkpoint.gguf.header import gguf_package
from moec.compiler.checkpoint.record import STORED_BYTES
from moec.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from moec.compiler.checkpoint.record import TensorEntry
    from moec.formats import Quantized


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
    """What rows of blocks say, of a type in `CARRIED`, in terms of its format."""
    return CARRIED[kind].codes(rows.reshape(len(rows), -1, _block(kind)[1]))


def _block(kind: str) -> tuple[int, int]:
    """Values and bytes of a block."""
    gguf = gguf_package()
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(values), int(size)
