"""Which experts of a step have a slot, who leaves for those that have none, and which of them are the CPU's.

One block; a thread for each of the T * K choices, and for each slot in turn. The policy is ``moec.planning.policies``'
to the bit. Numbers are int32 unless they say otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.primitives import (
    LINE_WORDS,
    call,
    element,
    i32,
    launch,
    launch_next,
    registers,
    shared,
    sync,
    wait_previous,
)
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.misses import number_misses
from moec.compiler.kernels.cuda.slots.pieces import Pieces
from moec.compiler.kernels.cuda.slots.places import Places, find_places
from moec.compiler.kernels.cuda.slots.state import State
from moec.compiler.kernels.cuda.slots.step import THREADS, Step
from moec.compiler.kernels.cuda.threads import each_of
from moec.compiler.kernels.emit import Argument, arguments, build, ceildiv, i64, load, store, symbol, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.slots.misses import Misses
    from moec.compiler.kernels.emit import Buffer, Expr


def assign() -> tirx.PrimFunc:
    """The kernel ``assign_experts(index, state, on_gpu, on_cpu)``; see ``moec.artifacts.words.slots``.

    ``on_gpu`` is ``index`` with -1 where the CPU computes the expert, ``on_cpu`` the other way round. At most
    ``MOST_ENTRIES`` choices.
    """

    def body() -> None:
        tokens, chosen, size = symbol("T"), symbol("K"), symbol("W")
        index, state, on_gpu, on_cpu = arguments(
            Argument("index", (tokens, chosen), "int64"),
            Argument("state", (size,), "int64"),
            Argument("on_gpu", (tokens, chosen), "int64"),
            Argument("on_cpu", (tokens, chosen), "int64"),
        )
        with launch((1,), THREADS) as (_, thread):
            launch_next()
            # Since the step before, all weights went through the cache that the state was in.
            for line in each_of(thread, THREADS, i32(ceildiv(size, LINE_WORDS))):
                call("prefetch_l2", element(state, i64(line) * i64(LINE_WORDS)))
            wait_previous()
            step = Step.read(index, State.of(state), thread, tokens, chosen)
            step.count()
            with when(thread < i32(words.MOST_AHEAD)):
                step.state.set_at(words.AHEAD_FETCH, thread, i64(-1))
            misses, places = number_misses(step), Places.none(thread)
            with when(misses.fetched > i32(0)):
                find_places(step, misses, places)
                _move_in(step, misses, places)
            _order(step, misses, places)
            _say_who(step, misses, on_gpu, on_cpu)
            with when(thread == i32(0)):
                _account(step, misses, places)

    return build(words.ASSIGN, body)


def _move_in(step: Step, misses: Misses, places: Places) -> None:
    """Give the missing experts their slots, and say from where to where they are fetched; a thread each."""
    state, number = step.state, step.thread
    with when(number < misses.fetched):
        expert, slot = settle(load(misses.expert, number)), settle(load(places.slot, number))
        stage, fetch = settle(load(places.stage, number)), settle(load(places.fetch, number))
        source, target = settle(state.part("home", expert)), registers(1, "int64")
        store(target, 0, source)
        with when(slot >= i32(0)):
            old = settle(state.part("owner", slot))
            with when(old >= i64(0)):
                state.set_part("slot", old, i64(-1))
            state.set_part("owner", slot, T.cast(expert, "int64"))
            state.set_part("slot", expert, T.cast(slot, "int64"))
            store(target, 0, _address(state, words.SLOT_ADDRESS, slot))
        with when(stage >= i32(0)):
            store(target, 0, _address(state, words.STAGE_ADDRESS, stage))
        state.set_at(words.TABLE, expert, load(target, 0))
        with when(fetch >= i32(0)):
            state.set_at(words.SOURCE, fetch, source)
            state.set_at(words.TARGET, fetch, load(target, 0))
            _take_ahead(step, expert, fetch)


def _take_ahead(step: Step, expert: Expr, fetch: Expr) -> None:
    """Have the fetch of an expert take what was brought of it ahead."""
    state = step.state
    which, pieces = step.ahead(expert)
    with when(which >= i32(0)):
        state.set_at(words.AHEAD_FETCH, which, T.cast(fetch, "int64"))
        size = T.cast(Pieces.of(state).bytes_before(pieces), "uint64")
        call("atomic_add_wide", element(state.buffer, words.AHEAD_BYTES), size)


def _address(state: State, first: int, number: Expr) -> Expr:
    return state.head(first) + T.cast(number, "int64") * state.head(words.STRIDE)


def _order(step: Step, misses: Misses, places: Places) -> None:
    """Put choices whose experts are there before those that wait for a fetch, which come in the fetches' order."""
    state, thread = step.state, step.thread
    fetch = shared(THREADS, "int32")
    with step.own():
        number = settle(load(misses.number, load(step.first, thread)))
        store(fetch, thread, i32(-1))
        with when(number >= i32(0)):
            store(fetch, thread, load(places.fetch, number))
        own = settle(load(step.expert, thread))
        with when(own >= i32(0)):
            state.set_part("fetch", own, T.cast(load(fetch, thread), "int64"))
        state.set_at(words.ARRIVED, thread, i64(0))
    sync()
    with step.own():
        position, mine = registers(1, "int32"), settle(load(fetch, thread))
        store(position, 0, i32(0))
        with T.serial(i32(0), step.entries) as entry:
            other = settle(load(fetch, entry))
            before = tirx.any(other < mine, tirx.all(other == mine, entry < thread))
            store(position, 0, load(position, 0) + T.cast(before, "int32"))
        state.set_at(words.POSITION, thread, T.cast(load(position, 0), "int64"))
        state.set_at(words.ORDER, load(position, 0), T.cast(thread, "int64"))


def _say_who(step: Step, misses: Misses, on_gpu: Buffer, on_cpu: Buffer) -> None:
    """Write each choice where it is computed."""
    thread = step.thread
    with step.own():
        own = settle(load(step.expert, thread))
        number = settle(load(misses.number, load(step.first, thread)))
        by_cpu = tirx.all(own >= i32(0), number >= misses.fetched)
        entry, expert = T.cast(thread, "int64"), T.cast(own, "int64")
        store(on_gpu, entry, T.Select(by_cpu, i64(-1), expert))
        store(on_cpu, entry, T.Select(by_cpu, expert, i64(-1)))


def _account(step: Step, misses: Misses, places: Places) -> None:
    """The clock and the counters."""
    state = step.state
    state.set_head(words.CLOCK, step.clock)
    state.set_head(words.FETCHES, T.cast(load(places.totals, 0), "int64"))
    counts = {
        words.HITS: misses.hits,
        words.MISSES: misses.count,
        words.CPU_MISSES: misses.count - misses.fetched,
        words.EVICTIONS: load(places.totals, 2),
    }
    for word, more in counts.items():
        state.set_head(word, state.head(word) + T.cast(more, "int64"))
