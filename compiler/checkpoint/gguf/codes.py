"""Block types of GGML whose codes a format of ours has too: what each block says, in that format's terms.

Blocks have 32 values; those of the K types, 256 in eight parts of 32. In bytes with two codes of 4 bits, byte j of 16
has value j in its low half and value j + 16 in its high one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.compiler.checkpoint.gguf.header import gguf_package
from moec.formats import Quantized

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Blocks = NDArray[np.uint8]

IQ4_NL_VALUES = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.int8)
"""What IQ4_NL's codes stand for, times the scale."""


@dataclass(frozen=True)
class Carried:
    """How a block type is carried over."""

    format: str
    codes: Callable[[Blocks], Quantized]
    """Of blocks ``[n, B, bytes]``."""
    exact: bool = True
    """Bit for bit; otherwise scales and minima are rounded to float16."""


def _halves(pairs: Blocks) -> Blocks:
    """Codes of 4 bits ``[..., 32]`` of bytes ``[..., 16]``."""
    return np.concatenate((pairs & 15, pairs >> 4), -1)


def _float16(blocks: Blocks, offset: int) -> NDArray[np.float16]:
    """A number of each block, ``[n, B]``."""
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view(np.float16)[..., 0]


def _rows(codes: NDArray[Any]) -> NDArray[Any]:
    return codes.reshape(len(codes), -1)


def _q4_0(blocks: Blocks) -> Quantized:
    return Quantized(_rows(_halves(blocks[..., 2:])), _float16(blocks, 0))


def _q4_1(blocks: Blocks) -> Quantized:
    return Quantized(_rows(_halves(blocks[..., 4:])), _float16(blocks, 0), minima=_float16(blocks, 2))


def _q4_k(blocks: Blocks) -> Quantized:
    """Factors of the whole block times 6 bits of each part, exact in float32, rounded to float16."""
    rows, count, _ = blocks.shape
    scale, minimum = gguf_package().quants.Q4_K.get_scale_min(blocks[..., 4:16].reshape(-1, 12))
    with np.errstate(over="ignore"):
        scales, minima = (
            (_float16(blocks, offset).astype(np.float32)[..., None] * six.reshape(rows, count, -1))
            .astype(np.float16)
            .reshape(rows, -1)
            for offset, six in ((0, scale), (2, minimum))
        )
    pairs = blocks[..., 16:].reshape(rows, count, -1, 32)
    codes = np.stack((pairs & 15, pairs >> 4), 3)
    return Quantized(_rows(codes), scales, minima=-minima)


def _q5_0(blocks: Blocks) -> Quantized:
    fifth = np.unpackbits(blocks[..., 2:6], -1, bitorder="little")
    codes = (_halves(blocks[..., 6:]) | fifth << 4).astype(np.int8) - np.int8(16)
    return Quantized(_rows(codes), _float16(blocks, 0))


def _q8_0(blocks: Blocks) -> Quantized:
    return Quantized(_rows(np.ascontiguousarray(blocks[..., 2:]).view(np.int8)), _float16(blocks, 0))


def _iq4_nl(blocks: Blocks) -> Quantized:
    return Quantized(_rows(IQ4_NL_VALUES[_halves(blocks[..., 2:])]), _float16(blocks, 0))


def _mxfp4(blocks: Blocks) -> Quantized:
    return Quantized(_rows(_halves(blocks[..., 1:])), blocks[..., 0])


CARRIED: dict[str, Carried] = {
    "IQ4_NL": Carried("int8-g32", _iq4_nl),
    "MXFP4": Carried("mxfp4", _mxfp4),
    "Q4_0": Carried("int4-g32", _q4_0),
    "Q4_1": Carried("int4-g32-m", _q4_1),
    "Q4_K": Carried("int4-g32-m", _q4_k, exact=False),
    "Q5_0": Carried("int8-g32", _q5_0),
    "Q8_0": Carried("int8-g32", _q8_0),
}
"""By GGML's name."""

STAND_IN = "int8-g32"
"""What the values of all other types are rounded to, and of these where an expert's matrices have several formats."""
