"""Whether weights of a few tokens' experts wait in registers or in rings of shared memory: by shape, as measured.

Registers do where two blocks of the first launch fit a multiprocessor and a thread of the second one has registers for
all that its tiling has in flight. Where it has not, something is spilled, or a single block has to keep the memory
busy, and rings are faster. Share of a copy's speed on an H200 in registers and in rings, experts of one token in
bfloat16 (decision 39; ``benchmarks/results/kernels-cuda-rings-h200.json`` has more sizes):

========================  ============  ==========  ==========
hidden, intermediate      why           1 expert    6 experts
========================  ============  ==========  ==========
4096, 14336 (Mixtral)     spills        .73, .94    .77, 1.04
7168, 2048 (DeepSeek-V3)  spills        .58, .61    .85, .96
2880, 2880 (gpt-oss)      one block     .49, .56    .72, .91
3584, 2560 (Qwen2-57B)    one block     .51, .58    .82, .94
2048, 8192, two products  spills        .47, .66    .55, .91
4096, 6400 (Phi-3.5)      registers do  .87, .84    1.03, 1.02
2048, 1408 (DeepSeek-V2)  registers do  .37, .42    .77, .75
4096, 1536 (Qwen3-235B)   registers do  .54, .50    .88, .82
768, 3072, two products   registers do  .30, .21    .45, .31
========================  ============  ==========  ==========

Both launches go the same way. What registers wait for lies in the first-level cache, and a kernel with rings leaves
28 KB of that to the kernel beside it: with one launch in each way six experts were slower than with either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.compiler.kernels.cuda.few.ring import REGISTERS, through_ring
from moec.compiler.kernels.cuda.few.stream import WORDS
from moec.compiler.kernels.cuda.few.tiling import Tiling, choose_tiling

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody

STEP_REGISTERS = 4 * WORDS
"""That a thread of the second launch needs for a step: two rows of weights, and values in two parts."""
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
    second = choose_tiling(body.hidden, body.intermediate)
    room = REGISTERS // (second.blocks * second.threads)
    fits = OTHER_REGISTERS + STEP_REGISTERS * second.unroll <= room
    return fits and _first_in_registers(body).blocks > 1


def _first_in_registers(body: ExpertBody) -> Tiling:
    streams = 2 if body.gated else 1
    return choose_tiling(streams * body.intermediate, body.hidden, streams=streams)


def _ringed(tiling: Tiling, columns: int, cut: RingCut) -> Tiling:
    return through_ring(tiling, columns, cut.bytes, registers_each=cut.registers, unroll=cut.unroll)
