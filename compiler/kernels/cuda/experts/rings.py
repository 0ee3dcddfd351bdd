"""Whether weights of a few tokens' experts wait in registers or in rings of shared memory: by shape, as measured.

Registers do, unless a thread of the second launch has not enough of them for what its tiling has in flight and spills,
or blocks of a launch are alone on their multiprocessor, with little in flight, and come one after the other. Share of a
copy's speed on an H200 in registers and in rings, experts of one token in bfloat16 (decision 39;
``benchmarks/results/kernels-cuda-rings-h200.json`` has more sizes and shapes):

============================  ================  ==========  ==========
hidden, intermediate          why               1 expert    6 experts
============================  ================  ==========  ==========
4096, 14336 (Mixtral)         spills            .73, .94    .77, 1.04
6144, 32768 (Grok-1)          spills            .76, .99    .78, 1.03
7168, 2048 (DeepSeek-V3)      spills            .58, .61    .85, .96
2048, 8192, two products      spills            .47, .66    .55, .91
2880, 2880 (gpt-oss)          alone, 60 KB      .49, .56    .72, .91
3584, 2560 (Qwen2-57B)        alone, 80 KB      .51, .58    .82, .94
2560, 1536 (ERNIE 4.5)        alone, 80 KB      .46, .41    .71, .74
7168, 4864 (Arctic)           alone, 80 KB      .73, .74    .97, 1.00
4096, 1408 (GLM-4.5-Air)      alone, 44 KB      .43, .50    .83, .86
2048, 1408 (DeepSeek-V2)      alone, one round  .37, .41    .77, .74
1536, 576                     alone, 96 KB      .24, .19    .44, .44
4096, 6400 (Phi-3.5)          registers do      .87, .84    1.03, 1.02
4096, 1536 (Qwen3-235B)       registers do      .54, .50    .87, .81
768, 3072, two products       registers do      .30, .21    .45, .31
============================  ================  ==========  ==========

Both launches go the same way. What registers wait for lies in the first-level cache, and a kernel with rings leaves
28 KB of that to the kernel beside it: with one launch in each way six experts were slower than with either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.compiler.kernels.cuda.few.ring import REGISTERS, through_ring
from moec.compiler.kernels.cuda.few.stream import WORDS
from moec.compiler.kernels.cuda.few.tiling import (
    LANES,
    STEP_COLUMNS,
    TILE_ROWS,
    Tiling,
    choose_tiling,
)
from moec.compiler.kernels.cuda.primitives import MULTIPROCESSORS

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody

STEP_REGISTERS = 4 * WORDS
"""That a thread of the second launch needs for a step: two rows of weights, and values in two parts."""
STEP_BYTES = 2 * TILE_ROWS * STEP_COLUMNS
"""Of weights that a warp has in flight for a step."""
ENOUGH_BYTES = 96 << 10
"""In flight on a multiprocessor."""
EXPERTS_AT_ONCE = 6
"""Of a launch, most often."""
OTHER_REGISTERS = 40
"""Of such a thread: with eight steps of 16 it uses 168 where it may have so many."""


@dataclass(frozen=True)
class RingCut:
    """How deep rings are in the blocks of a launch."""

    bytes: int
    registers: int
    """Of a thread, at least: as many blocks as leave it so many are held at once."""
    unroll: int
    """Steps of a round at most: values between the products are asked for a round ahead."""


FIRST = RingCut(48 << 10, 64, 1)
SECOND = RingCut(68 << 10, 88, 5)
"""A multiprocessor has room for two blocks of either launch, and for one of each: the second launch's first weights are
on their way while the first one multiplies."""


def first_tiling(body: ExpertBody) -> Tiling:
    """Of a first launch whose weights have 16 bits."""
    tiling = _first_in_registers(body)
    return tiling if in_registers(body) else _ringed(tiling, body.hidden, FIRST)


def second_tiling(body: ExpertBody) -> Tiling:
    """Of a second launch whose weights have 16 bits."""
    tiling = choose_tiling(body.hidden, body.intermediate)
    return tiling if in_registers(body) else _ringed(tiling, body.intermediate, SECOND)


def in_registers(body: ExpertBody) -> bool:
    """Whether weights of 16 bits wait in registers, in both launches."""
    first, second = _first_in_registers(body), choose_tiling(body.hidden, body.intermediate)
    needs = OTHER_REGISTERS + STEP_REGISTERS * second.unroll
    spills = needs > REGISTERS // (second.blocks * second.threads)
    return not (spills or _alone(first, body.intermediate, EXPERTS_AT_ONCE) or _alone(second, body.hidden))


def _alone(tiling: Tiling, rows: int, experts: int = 1) -> bool:
    """Whether blocks are alone on their multiprocessor, with little in flight, one after the other."""
    in_flight = STEP_BYTES * tiling.streams * tiling.unroll * tiling.threads // LANES
    blocks = experts * -(-rows // (TILE_ROWS * tiling.row_warps))
    return tiling.blocks == 1 and in_flight < ENOUGH_BYTES and blocks > MULTIPROCESSORS


def _first_in_registers(body: ExpertBody) -> Tiling:
    streams = 2 if body.gated else 1
    return choose_tiling(streams * body.intermediate, body.hidden, streams=streams)


def _ringed(tiling: Tiling, columns: int, cut: RingCut) -> Tiling:
    return through_ring(tiling, columns, cut.bytes, registers_each=cut.registers, unroll=cut.unroll)
