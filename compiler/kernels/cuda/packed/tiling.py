"""How products of packed weights with at most eight tokens are cut; a function of their shape."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from moec.compiler.kernels.cuda.few.tiling import TILE_ROWS, Tiling, tiles_of_block

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.packed.rows import PackedRow

ROW_WARPS = 1, 2, 4
COLUMN_WARPS = 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 14, 16
UNROLLS = 1, 2, 3, 4
USUAL_WARPS = 8
MOST_LOADS = 16
"""Of 16 bytes that a lane has in flight: 64 registers."""
LEAST_BLOCKS = 128
"""Below so many a GPU has multiprocessors to spare."""
TILES_AHEAD = 6
"""Matrices that are loaded ahead where a block takes one after the other."""
ACTIVATION_BYTES = 64 << 10
"""Of shared memory, where a block takes several tiles with the same activations."""


def packed_tiling(
    row: PackedRow,
    rows: int,
    *,
    batch: int = 1,
    streams: int = 1,
    ahead: int = 1,
    in_turn: bool = False,
    warps: int | None = None,
) -> Tiling:
    """The tiling for ``batch`` matrices of ``rows`` rows, where these are those of all weights of a launch.

    All columns are in flight at once where registers allow, eight warps or so in a block; codes are few bytes, and what
    takes time is the first of them. With ``ahead`` of more than one, a block takes several tiles of a matrix one after
    the other, so many rounds in flight: then rounds are no loss. ``in_turn`` says that it takes several matrices one
    after the other. With ``warps`` a block has so many of them.

    Raises:
        ValueError: blocks cannot have so many warps.
    """
    steps = -(-row.columns // row.step)

    def cost(split: tuple[int, int, int]) -> tuple[float, int, int, bool, int]:
        down, across, unroll = split
        rounds = -(-steps // (across * unroll))
        blocks = -(-rows // (TILE_ROWS * streams * down)) * batch
        waste = rounds * across * unroll / steps
        return (
            round(waste, 1),
            min(rounds, 2) if ahead == 1 else 0,
            abs(down * across - USUAL_WARPS),
            down > 1 and blocks < LEAST_BLOCKS,
            -unroll,
        )

    splits = [
        split
        for split in product(ROW_WARPS, COLUMN_WARPS, UNROLLS)
        if split[0] * split[1] <= 16
        and 2 * streams * split[2] * ahead <= MOST_LOADS
        and not (in_turn and split[0] > 2)
        and warps in (None, split[0] * split[1])
    ]
    if not splits:
        raise ValueError(f"{warps} warps")
    down, across, unroll = min(splits, key=cost)
    tiles = -(-rows // (TILE_ROWS * down * streams)) * batch
    blocks = 2 if down * across <= USUAL_WARPS else 1
    several = tiles_of_block(tiles, blocks) if batch == 1 and ahead == 1 and not in_turn else 1
    rounds = -(-steps // (across * unroll))
    most = TILES_AHEAD if in_turn else max(ahead, min(2, rounds * several))
    banks = max(1, min(most, MOST_LOADS // (2 * streams * unroll)))
    tiling = Tiling(down, across, unroll, several, streams, blocks, row.step, banks)
    return tiling if ahead == 1 else replace(tiling, shared_bytes=ACTIVATION_BYTES)
