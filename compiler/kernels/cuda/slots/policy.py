"""``moec.planning.policies`` on the GPU: integers of 64 bits, the same to the bit; a thread an expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.primitives import registers
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.emit import either, i64, load, store, when
from moec.planning.policies import EXPERT_BITS, MOST_USES, UNIT

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.slots.state import State
    from moec.compiler.kernels.emit import Expr

MOST_SHIFT = 63
LFRU_BITS = 12


def count_uses(state: State, expert: Expr, tokens: Expr, clock: Expr) -> None:
    """Note that ``tokens`` (int32) of a step chose ``expert``; ``clock`` (int64) has the step's tokens in it."""
    uses = settle(state.part("uses", expert))
    faded = registers(1, "int64")
    store(faded, 0, uses)
    with when(_is(state, "lrfu")):
        store(faded, 0, _faded(state, uses, settle(clock - state.part("last", expert))))
    more = load(faded, 0) + T.cast(tokens, "int64") * i64(UNIT)
    state.set_part("uses", expert, T.min(more, i64(MOST_USES)))
    state.set_part("last", expert, clock)


def key_of(state: State, expert: Expr, clock: Expr) -> Expr:
    """What decides who leaves, int64: the least, after the step's uses were counted."""
    last, score = settle(state.part("last", expert)), registers(1, "int64")
    store(score, 0, last)

    def lfru() -> None:
        store(
            score,
            0,
            T.truncdiv(state.part("uses", expert) << i64(LFRU_BITS), clock - last + i64(1)),
        )

    def others() -> None:
        with when(_is(state, "lrfu")):
            uses = _faded(state, settle(state.part("uses", expert)), settle(clock - last))
            store(score, 0, uses + state.part("prior", expert))
        with when(_is(state, "static")):
            store(score, 0, state.part("prior", expert))

    either(_is(state, "lfru"), lfru, others)
    below = i64((1 << EXPERT_BITS) - 1) - T.cast(expert, "int64")
    return settle(T.bitwise_or(load(score, 0) << i64(EXPERT_BITS), below))


def _is(state: State, name: str) -> Expr:
    return state.head(words.POLICY) == i64(words.POLICY_CODES[name])


def _faded(state: State, uses: Expr, age: Expr) -> Expr:
    """``uses`` halved every half-life, and on a straight line between two halvings."""
    shift = settle(state.head(words.HALF_LIFE))
    halved = settle(uses >> T.min(age >> shift, i64(MOST_SHIFT)))
    rest = settle(T.bitwise_and(age, (i64(1) << shift) - i64(1)))
    return halved - ((halved * rest) >> (shift + i64(1)))
