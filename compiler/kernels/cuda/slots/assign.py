"""Which experts of a step have a slot, who leaves for those that have none, and which of them are the CPU's.

One block; a thread for each of the T * K choices, and for each slot in turn. The policy is ``runtime.residency``'s to
the bit: scores are float64, and a miss takes a free slot, else that of the resident expert with the least score which
the step did not choose, else none. Numbers below are int32 unless they say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts import slots as words
from moec.compiler.kernels.cpu.emit import Argument, arguments, build, i64, load, store, symbol, when
from moec.compiler.kernels.cuda.primitives import (
    i32,
    launch,
    launch_next,
    registers,
    shared,
    sync,
    wait_previous,
)
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.state import State

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from moec.compiler.kernels.cpu.emit import Buffer, Expr

THREADS = words.MOST_ENTRIES
FREE, FIXED = -1, -2
"""In place of a slot's rank: nobody is in it; whoever is in it stays."""


def assign() -> tirx.PrimFunc:
    """The kernel ``assign_experts(index, state, on_gpu, on_cpu)``; see ``moec.artifacts.slots``.

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
            wait_previous()
            launch_next()
            step = _Step.read(index, State.of(state), thread, tokens, chosen)
            step.count()
            misses = step.number_misses()
            with when(misses.fetched > i32(0)):
                _give_places(step, misses)
            fetches = settle(T.min(misses.fetched, load(misses.placed, 0) + _stage_places(step)))
            _order(step, misses, fetches)
            _finish(step, misses, fetches, on_gpu, on_cpu)

    return build(words.ASSIGN, body)


@dataclass(frozen=True)
class _Misses:
    """The missing experts of a step."""

    number: Buffer
    """Shared ``[entries]``: of an entry that is the first of a missing expert, its number among them; else -1."""
    hits: Expr
    count: Expr
    fetched: Expr
    """The first so many are the GPU's, the others the CPU's."""
    placed: Buffer
    """Shared ``[1]``: how many of them have a place to be fetched to."""
    left: Buffer
    """Shared ``[1]``: how many experts leave."""


@dataclass(frozen=True)
class _Step:
    """The choices of a step."""

    state: State
    thread: Expr
    count_: Expr
    """T * K."""
    clock: Expr
    """int64, with this step's tokens."""
    expert: Buffer
    """Shared ``[entries]``: -1 where a choice is no expert."""
    first: Buffer
    """Shared ``[entries]``: the first entry of the same expert."""

    @classmethod
    def read(cls, index: Buffer, state: State, thread: Expr, tokens: Expr, chosen: Expr) -> _Step:
        """Take the choices into shared memory, and find each expert's first."""
        count = settle(T.cast(tokens * chosen, "int32"))
        clock = settle(state.head(words.CLOCK) + tokens)
        expert, first = shared(THREADS, "int32"), shared(THREADS, "int32")
        step = cls(state, thread, count, clock, expert, first)
        with step.own():
            number = settle(load(index, T.cast(thread, "int64")))
            known = tirx.all(number >= i64(0), number < state.experts)
            store(expert, thread, T.Select(known, T.cast(number, "int32"), i32(-1)))
        sync()
        with step.own():
            own = settle(load(expert, thread))
            earliest = registers(1, "int32")
            store(earliest, 0, thread)
            with T.serial(i32(0), thread) as back:
                other = T.bind(thread - i32(1) - back)
                with when(load(expert, other) == own):
                    store(earliest, 0, other)
            store(first, thread, load(earliest, 0))
        return step

    def own(self) -> AbstractContextManager[None]:
        """Statements of threads that have a choice."""
        return when(self.thread < self.count_)

    def count(self) -> None:
        """Count this step's uses, once for each expert."""
        sync()
        state = self.state
        with self.own():
            own = settle(load(self.expert, self.thread))
            with when(tirx.all(own >= i32(0), load(self.first, self.thread) == self.thread)):
                uses = registers(1, "int32")
                store(uses, 0, i32(0))
                with T.serial(self.thread, self.count_) as entry, when(load(self.expert, entry) == own):
                    store(uses, 0, load(uses, 0) + i32(1))
                before = T.reinterpret("float64", state.part("uses", own))
                after = before + T.cast(load(uses, 0), "float64")
                state.set_part("uses", own, T.reinterpret("int64", after))
                state.set_part("last", own, self.clock)

    def number_misses(self) -> _Misses:
        """Number the missing experts by their first entries, and divide them between GPU and CPU."""
        state, missing, number = self.state, shared(THREADS, "int32"), shared(THREADS, "int32")
        with self.own():
            own = settle(load(self.expert, self.thread))
            store(missing, self.thread, i32(-1))
            with when(tirx.all(own >= i32(0), load(self.first, self.thread) == self.thread)):
                has_none = state.part("slot", own) < i64(0)
                store(missing, self.thread, T.Select(has_none, i32(1), i32(0)))
        sync()
        sums = registers(3, "int32")
        for place in range(3):
            store(sums, place, i32(0))
        with T.serial(i32(0), self.count_) as entry:
            kind = settle(load(missing, entry))
            store(sums, 0, load(sums, 0) + T.cast(kind == i32(1), "int32"))
            store(sums, 1, load(sums, 1) + T.cast(kind == i32(0), "int32"))
            before = tirx.all(kind == i32(1), entry < self.thread)
            store(sums, 2, load(sums, 2) + T.cast(before, "int32"))
        with self.own():
            is_missing = load(missing, self.thread) == i32(1)
            store(number, self.thread, T.Select(is_missing, load(sums, 2), i32(-1)))
        count = settle(load(sums, 0))
        share = T.cast(state.at(words.SHARE, T.min(count, i32(words.MOST_SHARED))), "int32")
        fetched = settle(count - T.max(i32(0), T.min(share, count)))
        placed, left = shared(1, "int32"), shared(1, "int32")
        with when(self.thread == i32(0)):
            store(placed, 0, i32(0))
            store(left, 0, i32(0))
        sync()
        return _Misses(number, settle(load(sums, 1)), count, fetched, placed, left)


def _give_places(step: _Step, misses: _Misses) -> None:
    """Find a place for each miss of the GPU: a slot, room on the stage, or none: then it is read where it is."""
    state, thread = step.state, step.thread
    place = shared(THREADS, "int32")
    _rank_slots(step, misses, place)
    with step.own():
        number = settle(load(misses.number, thread))
        with when(tirx.all(number >= i32(0), number < misses.fetched)):
            own, slot = settle(load(step.expert, thread)), settle(load(place, number))
            source = settle(state.part("home", own))
            target = registers(1, "int64")
            store(target, 0, i64(0))
            with when(slot >= i32(0)):
                _move_in(state, own, slot)
                store(target, 0, _at(state, words.SLOT_ADDRESS, slot))
            with when(slot < i32(0)):
                room = settle(number - load(misses.placed, 0))
                with when(T.cast(room, "int64") < state.head(words.STAGE_PLACES)):
                    store(target, 0, _at(state, words.STAGE_ADDRESS, room))
            has_place = load(target, 0) != i64(0)
            state.set_at(words.TABLE, own, T.Select(has_place, load(target, 0), source))
            state.set_at(words.SOURCE, number, source)
            state.set_at(words.TARGET, number, load(target, 0))


def _at(state: State, first: int, number: Expr) -> Expr:
    return state.head(first) + T.cast(number, "int64") * state.head(words.STRIDE)


def _move_in(state: State, expert: Expr, slot: Expr) -> None:
    """Whoever is in ``slot`` leaves it to ``expert``."""
    old = settle(state.part("owner", slot))
    with when(old >= i64(0)):
        state.set_part("slot", old, i64(-1))
    state.set_part("owner", slot, T.cast(expert, "int64"))
    state.set_part("slot", expert, T.cast(slot, "int64"))


def _rank_slots(step: _Step, misses: _Misses, place: Buffer) -> None:
    """Order the slots: free ones, then those whose experts leave first; the n-th is the n-th miss's."""
    state, thread = step.state, step.thread
    score, rank = shared(words.MOST_EXPERTS, "float64"), shared(words.MOST_EXPERTS, "int32")
    store(place, thread, i32(-1))
    for slot in _each(thread, state.slots):
        owner = settle(state.part("owner", slot))
        store(rank, slot, i32(FREE))
        with when(owner >= i64(0)):
            store(rank, slot, T.cast(state.part("rank", owner), "int32"))
            with T.serial(i32(0), step.count_) as entry, when(_is(load(step.expert, entry), owner)):
                store(rank, slot, i32(FIXED))
            age = T.bind(step.clock - state.part("last", owner))
            store(score, slot, _score(state, owner, age))
    sync()
    free, able = registers(1, "int32"), registers(1, "int32")
    for slot in _each(thread, state.slots):
        own_rank, own_score = settle(load(rank, slot)), settle(load(score, slot))
        ahead = registers(1, "int32")
        for counter in (free, able, ahead):
            store(counter, 0, i32(0))
        with T.serial(i32(0), state.slots) as other:
            its_rank = settle(load(rank, other))
            is_free, can_leave = its_rank == i32(FREE), its_rank >= i32(0)
            store(free, 0, load(free, 0) + T.cast(is_free, "int32"))
            store(able, 0, load(able, 0) + T.cast(can_leave, "int32"))
            sooner = _leaves_first(load(score, other), its_rank, own_score, own_rank)
            before = T.Select(
                own_rank == i32(FREE), tirx.all(is_free, other < slot), tirx.all(can_leave, sooner)
            )
            store(ahead, 0, load(ahead, 0) + T.cast(before, "int32"))
        turn = registers(1, "int32")
        store(turn, 0, load(ahead, 0) + T.Select(own_rank == i32(FREE), i32(0), load(free, 0)))
        with when(tirx.all(own_rank != i32(FIXED), load(turn, 0) < misses.fetched)):
            store(place, load(turn, 0), slot)
        with when(slot == i32(0)):
            store(misses.placed, 0, T.min(misses.fetched, load(free, 0) + load(able, 0)))
            need = T.max(i32(0), misses.fetched - load(free, 0))
            store(misses.left, 0, T.min(need, load(able, 0)))
    sync()


def _is(expert: Expr, owner: Expr) -> Expr:
    return T.cast(expert, "int64") == owner


def _score(state: State, expert: Expr, age: Expr) -> Expr:
    """float64: ``uses / (age + 1)``, or minus the age."""
    uses = T.reinterpret("float64", state.part("uses", expert))
    lfru = uses / (T.cast(age, "float64") + T.float64(1))
    is_lru = state.head(words.POLICY) == i64(words.POLICY_CODES["lru"])
    return T.Select(is_lru, T.cast(i64(0) - age, "float64"), lfru)


def _leaves_first(score: Expr, rank: Expr, than_score: Expr, than_rank: Expr) -> Expr:
    return tirx.any(score < than_score, tirx.all(score == than_score, rank > than_rank))


def _each(thread: Expr, count: Expr) -> Iterator[Expr]:
    """A loop over this thread's share of ``count`` numbers; its body is emitted once."""
    turns = T.truncdiv(count + i32(THREADS - 1), i32(THREADS))
    with T.serial(i32(0), turns) as turn:
        number = T.bind(turn * i32(THREADS) + thread)
        with when(number < count):
            yield number


def _stage_places(step: _Step) -> Expr:
    return T.cast(T.min(step.state.head(words.STAGE_PLACES), i64(words.MOST_ENTRIES)), "int32")


def _order(step: _Step, misses: _Misses, fetches: Expr) -> None:
    """Put choices whose experts are there before those that wait for a fetch, which come in the fetches' order."""
    state, thread = step.state, step.thread
    fetch = shared(THREADS, "int32")
    with step.own():
        number = settle(load(misses.number, load(step.first, thread)))
        coming = tirx.all(number >= i32(0), number < fetches)
        store(fetch, thread, T.Select(coming, number, i32(-1)))
        own = settle(load(step.expert, thread))
        with when(own >= i32(0)):
            state.set_part("fetch", own, T.cast(load(fetch, thread), "int64"))
        state.set_at(words.ARRIVED, thread, i64(0))
    sync()
    with step.own():
        position, mine = registers(1, "int32"), settle(load(fetch, thread))
        store(position, 0, i32(0))
        with T.serial(i32(0), step.count_) as entry:
            other = settle(load(fetch, entry))
            before = tirx.any(other < mine, tirx.all(other == mine, entry < thread))
            store(position, 0, load(position, 0) + T.cast(before, "int32"))
        state.set_at(words.POSITION, thread, T.cast(load(position, 0), "int64"))
        state.set_at(words.ORDER, load(position, 0), T.cast(thread, "int64"))


def _finish(step: _Step, misses: _Misses, fetches: Expr, on_gpu: Buffer, on_cpu: Buffer) -> None:
    """Say who computes what, and count."""
    state, thread = step.state, step.thread
    with step.own():
        entry = T.cast(thread, "int64")
        own = settle(load(step.expert, thread))
        number = settle(load(misses.number, load(step.first, thread)))
        by_cpu = tirx.all(own >= i32(0), number >= misses.fetched)
        expert = T.cast(own, "int64")
        store(on_gpu, entry, T.Select(by_cpu, i64(-1), expert))
        store(on_cpu, entry, T.Select(by_cpu, expert, i64(-1)))
    with when(thread == i32(0)):
        state.set_head(words.CLOCK, step.clock)
        state.set_head(words.FETCHES, T.cast(fetches, "int64"))
        counts = {
            words.HITS: misses.hits,
            words.MISSES: misses.count,
            words.CPU_MISSES: misses.count - misses.fetched,
            words.EVICTIONS: load(misses.left, 0),
        }
        for word, more in counts.items():
            state.set_head(word, state.head(word) + T.cast(more, "int64"))
