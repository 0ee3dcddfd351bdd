"""The choices of a step, counted, and what was brought ahead for them. Numbers are int32 unless they say otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.primitives import i32, registers, shared, sync
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.policy import count_uses
from moec.compiler.kernels.emit import i64, load, store, when

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from moec.compiler.kernels.cuda.slots.state import State
    from moec.compiler.kernels.emit import Buffer, Expr

THREADS = words.MOST_ENTRIES


@dataclass(frozen=True)
class Step:
    """The choices of a step."""

    state: State
    thread: Expr
    entries: Expr
    """T * K."""
    clock: Expr
    """int64, with this step's tokens."""
    expert: Buffer
    """Shared ``[entries]``: -1 where a choice is no expert."""
    first: Buffer
    """Shared ``[entries]``: the first entry of the same expert."""
    slot: Buffer
    """int64 ``[1]`` of each thread: the slot that its choice's expert has as the step begins, -1 for none."""
    guessed: Expr
    """Whether pieces were brought ahead for this step."""

    @classmethod
    def read(cls, index: Buffer, state: State, thread: Expr, tokens: Expr, chosen: Expr) -> Step:
        """Take the choices into shared memory, and find each expert's first."""
        entries = settle(T.cast(tokens * chosen, "int32"))
        clock = settle(state.head(words.CLOCK) + tokens)
        guessed = settle(T.cast(state.head(words.AHEAD_CLOCK) + tokens == clock, "int32")) == i32(1)
        memory = shared(THREADS, "int32"), shared(THREADS, "int32"), registers(1, "int64")
        step = cls(state, thread, entries, clock, *memory, guessed)
        with step.own():
            number = settle(load(index, T.cast(thread, "int64")))
            known = tirx.all(number >= i64(0), number < state.experts)
            store(step.expert, thread, T.Select(known, T.cast(number, "int32"), i32(-1)))
            # Asked for here, it is there when the uses are counted.
            store(step.slot, 0, i64(-1))
            with when(known):
                store(step.slot, 0, state.part("slot", number))
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
