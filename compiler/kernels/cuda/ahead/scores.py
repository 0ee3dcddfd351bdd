"""How likely each expert of the next MoE layer is: by its own router, applied early, or by what follows what.

These run beside the layer's fetch, in a branch of the step: none begins before what it reads is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import ahead as words
from moec.compiler.kernels.cuda.primitives import LANES, i32, launch, registers, unroll, warp_sum
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.threads import read, threads
from moec.compiler.kernels.emit import (
    Argument,
    arguments,
    build,
    ceildiv,
    i64,
    load,
    loop,
    store,
    symbol,
    when,
)

if TYPE_CHECKING:
    from tvm import tirx

WARPS = 4
COLUMNS = 8
"""Neighbouring columns that a lane takes at a time."""


def score_early() -> tirx.PrimFunc:
    """The kernel ``score_early(x [T, H], router [E, H] bfloat16, scores [T, E])``: a warp for each row of the router.

    At most ``MOST_TOKENS`` tokens. A guess needs no rounding of a certain kind: sums are in float32.
    """

    def body() -> None:
        tokens, hidden, experts = symbol("T"), symbol("H"), symbol("E")
        x, router, scores = arguments(
            Argument("x", (tokens, hidden), "float32"),
            Argument("router", (experts, hidden), "bfloat16"),
            Argument("scores", (tokens, experts), "float32"),
        )
        with launch((ceildiv(experts, WARPS),), WARPS * LANES) as ((block,), thread):
            expert = settle(i64(block) * i64(WARPS) + i64(T.truncdiv(thread, i32(LANES))))
            lane = settle(i64(T.truncmod(thread, i32(LANES))))
            sums = registers(words.MOST_TOKENS)
            with unroll(words.MOST_TOKENS) as token:
                store(sums, token, T.float32(0))
            with when(expert < experts):
                with loop(ceildiv(hidden, LANES * COLUMNS)) as turn:
                    first = settle((turn * i64(LANES) + lane) * i64(COLUMNS))
                    with unroll(COLUMNS) as part:
                        column = settle(first + i64(part))
                        with when(column < hidden):
                            weight = settle(read(router, "bfloat16", expert * hidden + column))
                            with unroll(words.MOST_TOKENS) as token, when(i64(token) < tokens):
                                product = weight * load(x, i64(token) * hidden + column)
                                store(sums, token, load(sums, token) + product)
                with unroll(words.MOST_TOKENS) as token, when(i64(token) < tokens):
                    total = settle(warp_sum(settle(load(sums, token))))
                    with when(lane == i64(0)):
                        store(scores, i64(token) * experts + expert, total)

    return build(words.SCORE_EARLY, body)


def score_votes() -> tirx.PrimFunc:
    """The kernel ``score_votes(index [T, K], votes [E', E], scores [T, E])``: the sums of the chosen experts' rows."""

    def body() -> None:
        tokens, chosen, before, experts = symbol("T"), symbol("K"), symbol("F"), symbol("E")
        index, votes, scores = arguments(
            Argument("index", (tokens, chosen), "int64"),
            Argument("votes", (before, experts), "float32"),
            Argument("scores", (tokens, experts), "float32"),
        )
        with threads(tokens * experts) as number:
            token = settle(T.truncdiv(number, experts))
            expert, total = settle(number - token * experts), registers(1)
            store(total, 0, T.float32(0))
            with loop(chosen) as choice:
                own = settle(load(index, token * chosen + choice))
                with when(T.And(own >= i64(0), own < before)):
                    store(total, 0, load(total, 0) + load(votes, own * experts + expert))
            store(scores, number, load(total, 0))

    return build(words.SCORE_VOTES, body)
