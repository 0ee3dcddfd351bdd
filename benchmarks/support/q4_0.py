"""llama.cpp's Q4_0 and Q8_0 in numpy: the yardstick that our 4-bit formats are held against.

Both are public: blocks of 32 values that share a scale d, stored as float16. Q4_0 takes the value m of the largest
magnitude, d = m / -8, and stores floor(x / d + 8.5), at most 15, as 4 bits; Q8_0 takes d = largest magnitude / 127 and
stores the nearest integer. A product multiplies weights in Q4_0 by activations that were rounded to Q8_0 on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 32


def q4_0(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is left of ``values [.., K]`` after Q4_0; K is a multiple of 32."""
    blocks = values.reshape(-1, BLOCK)
    largest = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(1)]
    scale = largest / np.float32(-8)
    codes = np.minimum(np.floor(blocks * _inverse(scale)[:, None] + np.float32(8.5)), 15)
    result: NDArray[np.float32] = (codes - 8) * _stored(scale)[:, None]
    return result.reshape(values.shape)


def q8_0(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is left of ``values [.., K]`` after Q8_0; K is a multiple of 32."""
    blocks = values.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(1) / np.float32(127)
    scaled = blocks * _inverse(scale)[:, None]
    codes: NDArray[np.float32] = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    return (codes * _stored(scale)[:, None]).reshape(values.shape)


def _inverse(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def _stored(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    return scale.astype(np.float16).astype(np.float32)
