"""What the kernels need to know of the processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moec.compiler.kernels.cpu.pair_products import PairProducts

AVX2_LANES = 8
"""From this vector width on (x86-64-v3) the machine converts float16 and multiplies int16; below it neither."""


@dataclass(frozen=True)
class Machine:
    """A processor, as far as the register blocks depend on it."""

    lanes: int
    """float32 lanes of a vector register: 16 (AVX-512), 8 (AVX2), 4 (baseline x86-64)."""
    pairs: PairProducts | None = None
    """What multiplies bfloat16 in pairs, if the machine has such an instruction; it has 16 lanes then."""

    @property
    def rows(self) -> int:
        """Rows of the register block."""
        return 6 if self.lanes == 16 else 4

    @property
    def columns(self) -> int:
        """Columns of the register block; with ``rows`` it leaves registers for the operands."""
        return 4 if self.lanes == 16 else 2

    @property
    def native_f16(self) -> bool:
        """Whether the machine converts float16 itself."""
        return self.lanes >= AVX2_LANES

    @property
    def looks_up_sixteen(self) -> bool:
        """Whether there is an instruction that looks up each lane in a table of sixteen (AVX-512's ``vpermps``)."""
        return self.lanes == 16

    @property
    def looks_up_eight(self) -> bool:
        """Whether there is one for a table of eight (AVX2's)."""
        return self.lanes == 8

    @property
    def multiplies_shorts(self) -> bool:
        """Whether there is an instruction that adds up pairs of products of int16 in vectors of this width."""
        return self.lanes >= AVX2_LANES
