"""Floating point numbers of 8 and 4 bits (OCP OFP8 1.0 and Microscaling Formats 1.0), by their codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLOAT32_MANTISSA = 23
FLOAT32_BIAS = 127


@dataclass(frozen=True)
class MiniFloat:
    """A sign bit, exponent bits, mantissa bits; subnormal numbers, no infinities."""

    bits: int
    mantissa: int
    """Bits of mantissa."""
    bias: int
    """Of the exponent."""
    largest: float
    """The largest finite value; codes above that of a sign are NaN."""

    @property
    def sign(self) -> int:
        """The sign bit."""
        return 1 << (self.bits - 1)

    @property
    def largest_code(self) -> int:
        """Of ``largest``."""
        bits = int(np.float32(self.largest).view(np.int32))
        return (bits >> (FLOAT32_MANTISSA - self.mantissa)) - ((FLOAT32_BIAS - self.bias) << self.mantissa)

    def values(self) -> NDArray[np.float32]:
        """Every code's value, ``[2 ** bits]``."""
        codes = np.arange(self.sign)
        exponent, fraction = codes >> self.mantissa, codes & ((1 << self.mantissa) - 1)
        normal = exponent > 0
        steps = fraction + np.where(normal, 1 << self.mantissa, 0)
        values = np.ldexp(steps.astype(np.float32), np.maximum(exponent, 1) - self.bias - self.mantissa)
        values[self.largest_code + 1 :] = np.nan
        return np.concatenate((values, -values))

    def encode(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The code of the nearest value, of two equally near ones the even; beyond ``largest`` it is that."""
        magnitude = np.minimum(np.abs(values), np.float32(self.largest))
        dropped = FLOAT32_MANTISSA - self.mantissa
        bits = magnitude.view(np.int32)
        rounded = (bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)) >> dropped
        normal = rounded - ((FLOAT32_BIAS - self.bias) << self.mantissa)
        subnormal = np.rint(np.ldexp(magnitude, self.bias - 1 + self.mantissa)).astype(np.int32)
        codes = np.where(magnitude < np.ldexp(np.float32(1), 1 - self.bias), subnormal, normal)
        return (codes | np.where(np.signbit(values), self.sign, 0)).astype(np.uint8)


MINIFLOATS: dict[str, MiniFloat] = {
    "e4m3": MiniFloat(bits=8, mantissa=3, bias=7, largest=448.0),
    "e2m1": MiniFloat(bits=4, mantissa=1, bias=1, largest=6.0),
}
"""By the name that ``Format.codes`` has."""

E8M0_BIAS = 127


def e8m0_values() -> NDArray[np.float32]:
    """The value of each byte of an E8M0 scale, ``[256]``; the last is NaN."""
    return np.append(np.ldexp(np.float32(1), np.arange(255) - E8M0_BIAS), np.float32(np.nan))
