"""How a product with at most eight tokens is cut into blocks, warps and loads in flight; a function of its shape."""

from __future__ import annotations

from dataclasses import dataclass

FEW_TOKENS = 8
"""The columns of a tensor-core product: steps with more tokens take other kernels."""

TILE_ROWS = 16
STEP_COLUMNS = 32
"""What a warp multiplies with one load of 16 bytes a lane and row: two tensor-core products deep."""

LANES = 32
BLOCKS_AT_ONCE = 264
"""Two on each multiprocessor of the largest GPUs: smaller ones take them in turns."""
MOST_BLOCKS_WAITING = 1024
"""Above so many blocks, each takes several tiles: it then loads the next tile while it adds up one."""


@dataclass(frozen=True)
class Tiling:
    """How the warps of a block share the rows and columns of weights."""

    row_warps: int
    """Warps on different rows."""
    column_warps: int
    """Warps on the same rows, each with its own columns; their sums are added through shared memory."""
    unroll: int
    """Steps that a warp has in flight."""
    tiles: int = 1
    """Tiles of rows that a block takes one after the other."""
    streams: int = 1
    """Tiles of 16 rows that a warp multiplies at once with the same activations."""
    blocks: int = 2
    """Blocks that a multiprocessor is to hold at once: it bounds the registers of a thread."""
    step: int = STEP_COLUMNS
    """Columns of a step."""
    banks: int = 1
    """Rounds of steps that are in flight at once, where weights are packed."""
    shared_bytes: int = 32 << 10
    """Of activations that a block holds at most, where a round of eight tokens is no more."""
    ring: int = 0
    """Steps that are in flight in shared memory; none where weights wait in registers."""

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return LANES * self.row_warps * self.column_warps

    @property
    def rows(self) -> int:
        """Rows that a block has in its hands at once."""
        return TILE_ROWS * self.row_warps * self.streams

    @property
    def round_columns(self) -> int:
        """Columns that all warps together have in flight."""
        return self.step * self.column_warps * self.unroll

    def rounds(self, columns: int) -> int:
        """How often a block loads until it has seen ``columns`` columns."""
        return -(-columns // self.round_columns)


def choose_tiling(
    rows: int, columns: int, *, batch: int = 1, streams: int = 1, warps: int | None = None
) -> Tiling:
    """The tiling for weights ``[batch, rows, columns]``, where ``rows`` are those of all weights of a launch.

    Eight warps or so with 4 or 8 steps in flight each, so that one to three blocks fill a multiprocessor; as little
    waste in the last round as can be. With ``warps`` a block has so many of them.

    Raises:
        ValueError: so many warps have no share in so few columns.
    """
    steps = -(-columns // STEP_COLUMNS)
    splits = [split for split in _splits(steps, streams) if warps in (None, _row_warps(split[0]) * split[0])]
    if not splits:
        raise ValueError(f"{warps} warps for {columns} columns")
    column_warps, unroll = min(splits, key=lambda split: _cost(steps, streams, *split))
    row_warps = _row_warps(column_warps)
    tiles = -(-rows // (TILE_ROWS * row_warps * streams)) * batch
    blocks = 2 if row_warps * column_warps <= 8 else 1
    several = tiles_of_block(tiles, blocks) if batch == 1 else 1
    return Tiling(row_warps, column_warps, unroll, several, streams, blocks)


def tiles_of_block(tiles: int, blocks: int) -> int:
    """How many of so many tiles a block takes, where a multiprocessor holds so many blocks.

    What is a little more than all blocks at once would come in two waves, the second of which begins with nothing.
    """
    if blocks > 1 and BLOCKS_AT_ONCE < tiles <= 2 * BLOCKS_AT_ONCE:
        return 2
    return max(1, min(4, tiles // MOST_BLOCKS_WAITING))


def _row_warps(column_warps: int) -> int:
    return max(1, min(4, 4 // column_warps))


def _splits(steps: int, streams: int) -> list[tuple[int, int]]:
    unrolls = (2, 3, 4) if streams > 1 else (2, 3, 4, 5, 6, 8)
    return [
        (warps, unroll)
        for warps in (1, 2, 4, 6, 7, 8, 9, 10, 11, 12)
        for unroll in (1, *unrolls)
        if warps * unroll <= steps or (warps == 1 and unroll == 1)
    ]


def _cost(steps: int, streams: int, warps: int, unroll: int) -> tuple[float, int, int]:
    """Time in load rounds of the slowest warp, then distance from what suits a multiprocessor.

    On an H100 eight warps that have all of 2,048 columns in flight at once, 8 steps each, were 3 to 9 % faster than
    with 4 steps each.
    """
    in_flight = 4 if streams > 1 or steps < 32 else 8
    rounds = -(-steps // (warps * unroll))
    waste = rounds * warps * unroll / steps
    small = max(0.0, (min(32, steps) - warps * unroll) / 32)
    return (round(waste + small, 2), abs(warps - 8) + 2 * abs(unroll - in_flight), rounds)
