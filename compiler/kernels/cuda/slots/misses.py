"""Which experts of a step are missing, and which the CPU computes. Numbers are int32 unless they say otherwise."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.primitives import i32, registers, shared, sync
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.keys import FREE, least_key, slot_keys
from moec.compiler.kernels.cuda.slots.notes import copies_are_late
from moec.compiler.kernels.cuda.slots.pieces import Pieces
from moec.compiler.kernels.cuda.slots.policy import key_of
from moec.compiler.kernels.cuda.slots.step import THREADS
from moec.compiler.kernels.emit import i64, load, store, when

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.kernels.cuda.slots.step import Step
    from moec.compiler.kernels.emit import Buffer, Expr

HIT, MISSING, BEGUN, WHOLE = 0, 1, 2, 3
"""Of an expert that a step chose: it has a slot; none; none, and some or all of its pieces were brought ahead."""


@dataclass(frozen=True)
class Misses:
    """The missing experts of a step."""

    number: Buffer
    """Shared ``[entries]``: of an entry that is the first of a missing expert, its number among them; else -1."""
    expert: Buffer
    """Shared ``[count]``: by number."""
    key: Buffer
    """Shared int64 ``[count]``: by number."""
    slot_key: Buffer
    """Shared int64 ``[S]``, see `slot_keys`; nothing where none is missing."""
    late: Expr
    """1 where copies of an earlier step are under way."""
    hits: Expr
    count: Expr
    fetched: Expr
    """The first so many are the GPU's, the others the CPU's."""


@dataclass(frozen=True)
class _Kinds:
    """What each entry is, and how many are what."""

    kind: Buffer
    """Shared ``[entries]``; -1: its expert is an earlier entry's."""
    hits: Expr
    missing: Expr
    whole: Expr


def number_misses(step: Step) -> Misses:
    """Number the missing experts, and divide them between GPU and CPU; see `moec.planning.policies.divided`.

    Where the CPU computes none they come by their first entries. Otherwise the GPU takes first those that are there
    whole, which are no misses of the link, then those of which some pieces are, then the others by falling key.
    """
    kinds, late = _find_kinds(step), registers(1, "int32")
    own_key, slot_key = shared(THREADS, "int64"), shared(words.MOST_EXPERTS, "int64")
    store(late, 0, i32(0))
    with when(kinds.missing > i32(0)):
        store(late, 0, copies_are_late(step.state))
        slot_keys(step, slot_key, load(late, 0))
        with step.own(), when(load(kinds.kind, step.thread) >= i32(MISSING)):
            store(own_key, step.thread, key_of(step.state, load(step.expert, step.thread), step.clock))
        sync()
    earlier, closer = _places(step, kinds, own_key)
    by_cpu = _by_cpu(step, kinds, own_key, closer, slot_key)
    number, expert, key = shared(THREADS, "int32"), shared(THREADS, "int32"), shared(THREADS, "int64")
    with step.own():
        missing = load(kinds.kind, step.thread) >= i32(MISSING)
        place = settle(T.Select(by_cpu > i32(0), closer, earlier))
        store(number, step.thread, T.Select(missing, place, i32(-1)))
        with when(missing):
            store(expert, place, load(step.expert, step.thread))
            store(key, place, load(own_key, step.thread))
    sync()
    counts = kinds.hits, kinds.missing, settle(kinds.missing - by_cpu)
    return Misses(number, expert, key, slot_key, settle(load(late, 0)), *counts)


def _find_kinds(step: Step) -> _Kinds:
    """Look for the slot of each expert, and for what was brought of it."""
    kind = shared(THREADS, "int32")
    with step.own():
        own = settle(load(step.expert, step.thread))
        store(kind, step.thread, i32(-1))
        with when(step.leads(own)):
            store(kind, step.thread, i32(HIT))
            with when(load(step.slot, 0) < i64(0)):
                _, there = step.ahead(own)
                begun = T.Select(there > i64(0), i32(BEGUN), i32(MISSING))
                all_of_it = there >= Pieces.of(step.state).count
                store(kind, step.thread, T.Select(all_of_it, i32(WHOLE), begun))
    sync()
    hits, missing, whole = (registers(1, "int32") for _ in range(3))
    with _counting(step, hits, missing, whole) as entry:
        its = settle(load(kind, entry))
        _add(hits, its == i32(HIT))
        _add(missing, its >= i32(MISSING))
        _add(whole, its == i32(WHOLE))
    return _Kinds(kind, *(settle(load(counter, 0)) for counter in (hits, missing, whole)))


def _places(step: Step, kinds: _Kinds, own_key: Buffer) -> tuple[Expr, Expr]:
    """This entry's place among the missing ones: by first entry; and by what is there of it, then by falling key."""
    own_kind = settle(load(kinds.kind, step.thread))
    before, ahead = registers(1, "int32"), registers(1, "int32")
    with _counting(step, before, ahead) as entry:
        its = settle(load(kinds.kind, entry))
        missing = its >= i32(MISSING)
        greater = load(own_key, entry) > load(own_key, step.thread)
        _add(before, tirx.all(missing, entry < step.thread))
        _add(ahead, tirx.all(missing, tirx.any(its > own_kind, tirx.all(its == own_kind, greater))))
    return settle(load(before, 0)), settle(load(ahead, 0))


def _by_cpu(step: Step, kinds: _Kinds, own_key: Buffer, closer: Expr, slot_key: Buffer) -> Expr:
    """How many missing experts the CPU computes: its share, but not the first one where that is worth a slot."""
    absent = settle(kinds.missing - kinds.whole)
    by_cpu, first = registers(1, "int32"), shared(1, "int64")
    store(by_cpu, 0, i32(0))
    with when(absent > i32(0)):
        share = T.cast(step.state.at(words.SHARE, T.min(absent, i32(words.MOST_SHARED))), "int32")
        store(by_cpu, 0, T.max(i32(0), T.min(share, absent)))
    with when(tirx.all(absent > i32(0), load(by_cpu, 0) == absent)):
        with step.own():
            missing = load(kinds.kind, step.thread) >= i32(MISSING)
            with when(tirx.all(missing, closer == kinds.whole)):
                store(first, 0, load(own_key, step.thread))
        least = least_key(step, slot_key)
        store(by_cpu, 0, absent - T.cast(_is_worth(step, load(first, 0), least), "int32"))
    return settle(load(by_cpu, 0))


def _is_worth(step: Step, key: Expr, least: Expr) -> Expr:
    """Whether an expert gets a slot though the CPU would compute it."""
    margin = settle(step.state.head(words.WORTH))
    in_turn = T.truncmod(step.clock, i64(words.LEARN_TOKENS)) < step.clock - step.state.head(words.CLOCK)
    ahead = tirx.any(least == i64(FREE), key - margin > least)
    return tirx.any(tirx.all(margin < i64(0), in_turn), tirx.all(margin >= i64(0), ahead))


@contextmanager
def _counting(step: Step, *counters: Buffer) -> Iterator[Expr]:
    """A loop over the step's entries, with counters that begin at 0."""
    for counter in counters:
        store(counter, 0, i32(0))
    with T.serial(i32(0), step.entries) as entry:
        yield entry


def _add(counter: Buffer, is_one: Expr) -> None:
    store(counter, 0, load(counter, 0) + T.cast(is_one, "int32"))
