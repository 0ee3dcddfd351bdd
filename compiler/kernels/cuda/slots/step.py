"""The choices of a step, and which of their experts are missing. Numbers are int32 unless they say otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.primitives import i32, registers, shared, sync
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.pieces import Pieces
from moec.compiler.kernels.cuda.slots.policy import count_uses
from moec.compiler.kernels.emit import i64, load, store, when

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from moec.compiler.kernels.cuda.slots.state import State
    from moec.compiler.kernels.emit import Buffer, Expr

THREADS = words.MOST_ENTRIES
HIT, MISSING, BEGUN, WHOLE = 0, 1, 2, 3
"""Of an expert that a step chose: it has a slot; none; none, and some or all of its pieces were brought ahead."""


@dataclass(frozen=True)
class Misses:
    """The missing experts of a step."""

    number: Buffer
    """Shared ``[entries]``: of an entry that is the first of a missing expert, its number among them; else -1."""
    expert: Buffer
    """Shared ``[count]``: by number."""
    hits: Expr
    count: Expr
    fetched: Expr
    """The first so many are the GPU's, the others the CPU's."""


@dataclass(frozen=True)
class Step:
    """The choices of a step."""

    state: State
    thread: Expr
    entries: Expr
    """T * K."""
    clock: Expr
    """int64, with this step's tokens."""
    learns: Expr
    """Whether at least one missing expert is fetched."""
    expert: Buffer
    """Shared ``[entries]``: -1 where a choice is no expert."""
    first: Buffer
    """Shared ``[entries]``: the first entry of the same expert."""
    guessed: Expr
    """Whether pieces were brought ahead for this step."""

    @classmethod
    def read(cls, index: Buffer, state: State, thread: Expr, tokens: Expr, chosen: Expr) -> Step:
        """Take the choices into shared memory, and find each expert's first."""
        entries = settle(T.cast(tokens * chosen, "int32"))
        clock = settle(state.head(words.CLOCK) + tokens)
        learns = settle(T.truncmod(clock, i64(words.LEARN_TOKENS)) < T.cast(tokens, "int64"))
        guessed = settle(T.cast(state.head(words.AHEAD_CLOCK) + tokens == clock, "int32")) == i32(1)
        memory = shared(THREADS, "int32"), shared(THREADS, "int32")
        step = cls(state, thread, entries, clock, learns, *memory, guessed)
        with step.own():
            number = settle(load(index, T.cast(thread, "int64")))
            known = tirx.all(number >= i64(0), number < state.experts)
            store(step.expert, thread, T.Select(known, T.cast(number, "int32"), i32(-1)))
        sync()
        with step.own():
            own = settle(load(step.expert, thread))
            earliest = registers(1, "int32")
            store(earliest, 0, thread)
            with T.serial(i32(0), thread) as back:
                other = T.bind(thread - i32(1) - back)
                with when(load(step.expert, other) == own):
                    store(earliest, 0, other)
            store(step.first, thread, load(earliest, 0))
        return step

    def own(self) -> AbstractContextManager[None]:
        """Statements of threads that have a choice."""
        return when(self.thread < self.entries)

    def leads(self, own: Expr) -> Expr:
        """Whether this thread's choice is the first of an expert; ``own`` is its expert."""
        return tirx.all(own >= i32(0), load(self.first, self.thread) == self.thread)

    def count(self) -> None:
        """Count this step's uses, once for each expert."""
        sync()
        with self.own():
            own = settle(load(self.expert, self.thread))
            with when(self.leads(own)):
                uses = registers(1, "int32")
                store(uses, 0, i32(0))
                with T.serial(self.thread, self.entries) as entry, when(load(self.expert, entry) == own):
                    store(uses, 0, load(uses, 0) + i32(1))
                count_uses(self.state, own, load(uses, 0), self.clock)

    def ahead(self, expert: Expr) -> tuple[Expr, Expr]:
        """Which of ``MOST_AHEAD`` an expert is, -1: none, and how many of its pieces are there."""
        state, which, pieces = self.state, registers(1, "int32"), registers(1, "int64")
        store(which, 0, i32(-1))
        store(pieces, 0, i64(0))
        with when(self.guessed):
            home = settle(state.part("home", expert))
            for number in range(words.MOST_AHEAD):
                there = settle(state.head(words.AHEAD_PIECES + number))
                same = state.head(words.AHEAD_HOME + number) == home
                with when(tirx.all(there > i64(0), same)):
                    store(which, 0, i32(number))
                    store(pieces, 0, there)
        return settle(load(which, 0)), settle(load(pieces, 0))

    def number_misses(self) -> Misses:
        """Number the missing experts by their first entries, and divide them between GPU and CPU.

        Where the CPU has a share, the GPU takes first those that are there whole, which are no misses of the link, then
        those of which some pieces are.
        """
        state, kinds, number = self.state, shared(THREADS, "int32"), shared(THREADS, "int32")
        expert = shared(THREADS, "int32")
        with self.own():
            own = settle(load(self.expert, self.thread))
            store(kinds, self.thread, i32(-1))
            with when(self.leads(own)):
                store(kinds, self.thread, i32(HIT))
                with when(state.part("slot", own) < i64(0)):
                    _, there = self.ahead(own)
                    begun = T.Select(there > i64(0), i32(BEGUN), i32(MISSING))
                    all_of_it = there >= Pieces.of(state).count
                    store(kinds, self.thread, T.Select(all_of_it, i32(WHOLE), begun))
        sync()
        own_kind = settle(load(kinds, self.thread))
        count, hits, whole, before, sooner = (registers(1, "int32") for _ in range(5))
        for counter in (count, hits, whole, before, sooner):
            store(counter, 0, i32(0))
        with T.serial(i32(0), self.entries) as entry:
            kind = settle(load(kinds, entry))
            missing, earlier = kind >= i32(MISSING), entry < self.thread
            closer = tirx.any(kind > own_kind, tirx.all(kind == own_kind, earlier))
            for counter, is_one in (
                (count, missing),
                (hits, kind == i32(HIT)),
                (whole, kind == i32(WHOLE)),
                (before, tirx.all(missing, earlier)),
                (sooner, tirx.all(missing, closer)),
            ):
                store(counter, 0, load(counter, 0) + T.cast(is_one, "int32"))
        total, there = settle(load(count, 0)), settle(load(whole, 0))
        share = T.cast(state.at(words.SHARE, T.min(total - there, i32(words.MOST_SHARED))), "int32")
        most = T.min(T.Select(self.learns, total - i32(1), total), total - there)
        by_cpu = settle(T.max(i32(0), T.min(share, most)))
        with self.own():
            kind = settle(load(kinds, self.thread))
            place = registers(1, "int32")
            store(place, 0, load(before, 0))
            with when(by_cpu > i32(0)):
                store(place, 0, load(sooner, 0))
            store(number, self.thread, T.Select(kind >= i32(MISSING), load(place, 0), i32(-1)))
            with when(kind >= i32(MISSING)):
                store(expert, load(place, 0), load(self.expert, self.thread))
        sync()
        return Misses(number, expert, settle(load(hits, 0)), total, settle(total - by_cpu))
