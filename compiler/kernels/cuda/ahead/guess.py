"""Which experts the next layer will likely choose, and which pieces of the missing ones are to be brought.

One block. As many are guessed for a token as it chooses. The likeliest of every token comes before the second of any;
of those that have no slot and are in host memory, the first get pieces as far as the bound reaches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import ahead as words
from moec.artifacts.words import slots
from moec.compiler.kernels.cuda.ahead.words import AheadWords
from moec.compiler.kernels.cuda.primitives import i32, launch, registers, shared, sync
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.pieces import Pieces
from moec.compiler.kernels.cuda.slots.state import State
from moec.compiler.kernels.cuda.threads import each_of
from moec.compiler.kernels.emit import Argument, arguments, build, i64, load, loop, store, symbol, when

if TYPE_CHECKING:
    from moec.compiler.kernels.emit import Buffer, Expr

THREADS = 256
NOT_GUESSED = 1 << 30
"""In place of an expert's place among the guesses."""


def guess() -> tirx.PrimFunc:
    """The kernel ``guess_experts(scores [T, E], state [W], ahead [A])``; see ``moec.artifacts.words.ahead``."""

    def body() -> None:
        tokens, experts, size, total = symbol("T"), symbol("E"), symbol("W"), symbol("A")
        scores, state_buffer, ahead_buffer = arguments(
            Argument("scores", (tokens, experts), "float32"),
            Argument("state", (size,), "int64"),
            Argument("ahead", (total,), "int64"),
        )
        with launch((1,), THREADS) as (_, thread):
            state, ahead = State.of(state_buffer), AheadWords(ahead_buffer)
            best = shared(slots.MOST_EXPERTS, "int32")
            count = settle(T.cast(experts, "int32"))
            _rank(scores, best, ahead, thread, tokens, count)
            likeliest = _missing(best, state, ahead, thread, count)
            with when(thread == i32(0)):
                _give(likeliest, state, ahead)
                ahead.set_at(words.TOKENS, 0, tokens)

    return build(words.GUESS, body)


def _rank(scores: Buffer, best: Buffer, ahead: AheadWords, thread: Expr, tokens: Expr, count: Expr) -> None:
    """Note the guesses for each token, and in ``best`` each expert's first place among all of them."""
    own, top_k = shared(slots.MOST_EXPERTS), settle(T.cast(ahead.at(words.TOP_K), "int32"))
    for expert in each_of(thread, THREADS, count):
        store(best, expert, i32(NOT_GUESSED))
    with loop(tokens) as token:
        sync()
        for expert in each_of(thread, THREADS, count):
            store(own, expert, load(scores, token * i64(count) + i64(expert)))
        sync()
        for expert in each_of(thread, THREADS, count):
            mine, rank = settle(load(own, expert)), registers(1, "int32")
            store(rank, 0, i32(0))
            with T.serial(i32(0), count) as other:
                its = settle(load(own, other))
                sooner = tirx.any(its > mine, tirx.all(its == mine, other < expert))
                store(rank, 0, load(rank, 0) + T.cast(sooner, "int32"))
            place = settle(load(rank, 0))
            with when(place < top_k):
                number = T.cast(token, "int32") * top_k + place
                ahead.set_at(words.GUESSED, number, T.cast(expert, "int64"))
                turn = place * T.cast(tokens, "int32") + T.cast(token, "int32")
                store(best, expert, T.min(load(best, expert), turn))
    sync()


def _missing(best: Buffer, state: State, ahead: AheadWords, thread: Expr, count: Expr) -> Buffer:
    """The first ``MOST_AHEAD`` guessed experts that are to be brought, int32, -1 for none."""
    for expert in each_of(thread, THREADS, count):
        absent = tirx.all(state.part("slot", expert) < i64(0), ahead.at(words.HOMES, expert) != i64(0))
        with when(T.Not(absent)):
            store(best, expert, i32(NOT_GUESSED))
    likeliest = shared(slots.MOST_AHEAD, "int32")
    with when(thread < i32(slots.MOST_AHEAD)):
        store(likeliest, thread, i32(-1))
    sync()
    for expert in each_of(thread, THREADS, count):
        mine, place = settle(load(best, expert)), registers(1, "int32")
        with when(mine < i32(NOT_GUESSED)):
            store(place, 0, i32(0))
            with T.serial(i32(0), count) as other:
                store(place, 0, load(place, 0) + T.cast(load(best, other) < mine, "int32"))
            with when(load(place, 0) < i32(slots.MOST_AHEAD)):
                store(likeliest, load(place, 0), expert)
    sync()
    return likeliest


def _give(likeliest: Buffer, state: State, ahead: AheadWords) -> None:
    """Give out the bound in the experts' order."""
    pieces, left = Pieces.of(state), registers(1, "int64")
    store(left, 0, ahead.at(words.BOUND))
    for number in range(slots.MOST_AHEAD):
        expert, share = settle(load(likeliest, number)), registers(1, "int64")
        store(share, 0, i64(0))
        with when(expert >= i32(0)):
            store(share, 0, T.min(load(left, 0), pieces.count))
            state.set_head(slots.AHEAD_HOME + number, ahead.at(words.HOMES, expert))
        own = settle(load(share, 0))
        state.set_head(slots.AHEAD_PIECES + number, own)
        store(left, 0, load(left, 0) - own)
        ahead.add(words.FETCHED, pieces.bytes_before(own))
    state.set_head(slots.AHEAD_PLACE, ahead.at(words.STAGING))
    state.set_head(slots.AHEAD_CLOCK, state.head(slots.CLOCK))


def check() -> tirx.PrimFunc:
    """The kernel ``check_guess(index [T, K], ahead [A])``: hold the guess that stands, if any, against the choices."""

    def body() -> None:
        tokens, chosen, total = symbol("T"), symbol("K"), symbol("A")
        index, ahead_buffer = arguments(
            Argument("index", (tokens, chosen), "int64"),
            Argument("ahead", (total,), "int64"),
        )
        with launch((1,), THREADS) as (_, thread):
            ahead, right = AheadWords(ahead_buffer), shared(THREADS, "int32")
            top_k = settle(T.cast(ahead.at(words.TOP_K), "int32"))
            stands = settle(T.cast(ahead.at(words.TOKENS) == tokens, "int32"))
            own, width = settle(T.cast(thread, "int64")), settle(T.cast(chosen, "int32"))
            store(right, thread, i32(0))
            with when(own < tokens * chosen):
                token, expert = settle(T.truncdiv(thread, width)), settle(load(index, own))
                with T.serial(i32(0), top_k) as other:
                    same = ahead.at(words.GUESSED, token * top_k + other) == expert
                    store(right, thread, T.Select(same, i32(1), load(right, thread)))
            sync()
            with when(tirx.all(thread == i32(0), stands == i32(1))):
                _count(right, ahead, tokens, width)
                ahead.set_at(words.TOKENS, 0, i64(0))

    return build(words.CHECK, body)


def _count(right: Buffer, ahead: AheadWords, tokens: Expr, width: Expr) -> None:
    every, exact = registers(1, "int32"), registers(1, "int32")
    store(every, 0, i32(0))
    store(exact, 0, i32(0))
    count = settle(T.cast(tokens, "int32"))
    with T.serial(i32(0), count) as token:
        own = registers(1, "int32")
        store(own, 0, i32(0))
        with T.serial(i32(0), width) as choice:
            store(own, 0, load(own, 0) + load(right, token * width + choice))
        store(every, 0, load(every, 0) + load(own, 0))
        store(exact, 0, load(exact, 0) + T.cast(load(own, 0) == width, "int32"))
    ahead.add(words.CHOSEN, count * width)
    ahead.add(words.RIGHT, load(every, 0))
    ahead.add(words.SEEN, count)
    ahead.add(words.EXACT, load(exact, 0))
