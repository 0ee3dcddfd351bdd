"""How decoding divides attention over blocks, warps and registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.compiler.kernels.cuda.few.tiling import FEW_TOKENS
from moec.compiler.kernels.cuda.primitives import COUNTERS, MULTIPROCESSORS

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec

WARPS = 8
THREADS = 32 * WARPS
TILE = 16
"""Keys that a warp takes at a time."""

WIDEST = 256
"""Largest dimension whose sums fit in registers."""

MOST_SPLITS = 64
BLOCK_TILES = 2 * WARPS
"""Tiles for which one more block is worth combining results."""


@dataclass(frozen=True)
class Plan:
    """The division for one attention; a block has ``rows`` query heads of one key head."""

    spec: AttentionSpec
    rows: int
    """8: the upper half of the tensor cores' 16 rows holds what rounding the lower half left out. 16: two products."""
    tiles: int
    """Blocks that share a key head's query heads."""
    splits: int
    """Blocks that share a context."""

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.spec.query_heads // self.spec.kv_heads

    @property
    def used(self) -> int:
        """The most query heads that a block has."""
        return min(self.rows, self.group)

    @property
    def key_steps(self) -> int:
        """Pieces of 32 dimensions of a key."""
        return -(-self.spec.key_dim // 32)

    @property
    def value_steps(self) -> int:
        """Pieces of 64 dimensions of a value."""
        return -(-self.spec.value_dim // 64)

    @property
    def value_steps_at_once(self) -> int:
        """How many of them a lane holds: wider values are loaded piece by piece, for want of registers."""
        return min(self.value_steps, 2)

    @property
    def halves(self) -> int:
        """Rows of scores that a lane has."""
        return self.rows // 8

    @property
    def units(self) -> int:
        """Independent results of a token, each of up to ``rows`` heads."""
        return self.spec.kv_heads * self.tiles

    @property
    def partial_floats(self) -> int:
        """What one block leaves: sums of values, then maximum and total of each row."""
        return self.used * self.spec.value_dim + -(-2 * self.used // 4) * 4

    @property
    def workspace_bytes(self) -> int:
        """Partial results of the largest step that is decoded."""
        return 4 * FEW_TOKENS * self.units * self.splits * self.partial_floats


def plan(spec: AttentionSpec) -> Plan:
    """The division; the spec's cache is of 16 bits, and its dimensions are multiples of 8 up to ``WIDEST``."""
    group = spec.query_heads // spec.kv_heads
    rows = 8 if group <= 8 else 16
    tiles = -(-group // rows)
    units = spec.kv_heads * tiles
    splits = max(1, min(MOST_SPLITS, MULTIPROCESSORS // units)) if FEW_TOKENS * units <= COUNTERS else 1
    return Plan(spec, rows, tiles, splits)
