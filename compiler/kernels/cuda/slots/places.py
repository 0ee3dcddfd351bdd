"""Where each missing expert goes: into whose slot, onto the stage, or nowhere. Numbers are int32.

Free slots come first, then those of experts that the step did not choose, the least key first. One thread gives them
out, miss by miss: whether one takes a slot may depend on what the ones before took.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.primitives import i32, registers, shared, sync
from moec.compiler.kernels.cuda.settle import settle
from moec.compiler.kernels.cuda.slots.keys import FREE
from moec.compiler.kernels.cuda.slots.step import THREADS
from moec.compiler.kernels.cuda.threads import each_of
from moec.compiler.kernels.emit import either, i64, load, store, when

if TYPE_CHECKING:
    from moec.compiler.kernels.cuda.slots.misses import Misses
    from moec.compiler.kernels.cuda.slots.step import Step
    from moec.compiler.kernels.emit import Buffer, Expr


@dataclass(frozen=True)
class Places:
    """What was found, in shared memory; by the number of the miss."""

    slot: Buffer
    """-1: none."""
    stage: Buffer
    """-1: none."""
    fetch: Buffer
    """Its number among the fetches; -1: it is read where it is in host memory."""
    totals: Buffer
    """``[3]``: fetches, places of the stage taken, experts that leave."""

    @classmethod
    def none(cls, thread: Expr) -> Places:
        """Before anything is found."""
        slot, stage, fetch, totals = (shared(size, "int32") for size in (THREADS, THREADS, THREADS, 3))
        for buffer in (slot, stage, fetch):
            store(buffer, thread, i32(-1))
        with when(thread < i32(3)):
            store(totals, thread, i32(0))
        sync()
        return cls(slot, stage, fetch, totals)


@dataclass(frozen=True)
class _Ranked:
    """The slots that can be given, in shared memory."""

    free: Buffer
    """``[free_count]``."""
    free_count: Buffer
    """``[1]``."""
    victim: Buffer
    """``[victim_count]``: slots by rising key."""
    victim_key: Buffer
    """int64."""
    victim_count: Buffer
    """``[1]``."""


def find_places(step: Step, misses: Misses, places: Places) -> None:
    """Fill ``places`` for the misses of the GPU."""
    ranked = _rank(step, misses)
    with when(step.thread == i32(0)):
        _give(step, misses, places, ranked)
    sync()


def _rank(step: Step, misses: Misses) -> _Ranked:
    """Order the slots; only as many as there are misses matter."""
    state, thread = step.state, step.thread
    ranked = _Ranked(
        shared(THREADS, "int32"),
        shared(1, "int32"),
        shared(THREADS, "int32"),
        shared(THREADS, "int64"),
        shared(1, "int32"),
    )
    with when(thread == i32(0)):
        store(ranked.free_count, 0, i32(0))
        store(ranked.victim_count, 0, i32(0))
    sync()
    for slot in each_of(thread, THREADS, state.slots):
        _place_slot(slot, misses.slot_key, state.slots, misses, ranked)
    sync()
    return ranked


def _place_slot(slot: Expr, key: Buffer, slots: Expr, misses: Misses, ranked: _Ranked) -> None:
    """Put one slot where it belongs among its like: free ones by number, others by key."""
    own = settle(load(key, slot))
    free, able, ahead = (registers(1, "int32") for _ in range(3))
    for counter in (free, able, ahead):
        store(counter, 0, i32(0))
    with T.serial(i32(0), slots) as other:
        its = settle(load(key, other))
        is_free, can_leave = its == i64(FREE), its >= i64(0)
        sooner = T.Select(own == i64(FREE), tirx.all(is_free, other < slot), tirx.all(can_leave, its < own))
        for counter, is_one in ((free, is_free), (able, can_leave), (ahead, sooner)):
            store(counter, 0, load(counter, 0) + T.cast(is_one, "int32"))
    place = settle(load(ahead, 0))
    with when(place < misses.fetched):
        with when(own == i64(FREE)):
            store(ranked.free, place, slot)
        with when(own >= i64(0)):
            store(ranked.victim, place, slot)
            store(ranked.victim_key, place, own)
    with when(slot == i32(0)):
        store(ranked.free_count, 0, load(free, 0))
        store(ranked.victim_count, 0, load(able, 0))


def _give(step: Step, misses: Misses, places: Places, ranked: _Ranked) -> None:
    """Go through the misses of the GPU in order; where copies are late nothing goes to the stage."""
    better = settle(step.state.head(words.ADMITS_BETTER) != i64(0))
    most = i64(words.MOST_ENTRIES)
    places_there = T.Select(misses.late == i32(1), i64(0), step.state.head(words.STAGE_PLACES))
    room = settle(T.cast(T.min(places_there, most), "int32"))
    given, left, staged, fetches = (registers(1, "int32") for _ in range(4))
    for counter in (given, left, staged, fetches):
        store(counter, 0, i32(0))

    def fetch(number: Expr, target: Buffer, slot: Expr, counter: Buffer) -> None:
        store(target, number, slot)
        store(counter, 0, load(counter, 0) + i32(1))
        store(places.fetch, number, load(fetches, 0))
        store(fetches, 0, load(fetches, 0) + i32(1))

    with T.serial(i32(0), misses.fetched) as number:
        victim = settle(T.min(load(left, 0), i32(THREADS - 1)))
        admitted = tirx.any(T.Not(better), load(misses.key, number) > load(ranked.victim_key, victim))
        takes = settle(T.cast(tirx.all(load(left, 0) < load(ranked.victim_count, 0), admitted), "int32"))
        either(
            load(given, 0) < load(ranked.free_count, 0),
            lambda: fetch(number, places.slot, load(ranked.free, load(given, 0)), given),
            lambda: either(
                takes == i32(1),
                lambda: fetch(number, places.slot, load(ranked.victim, victim), left),
                lambda: _stage(number, places, load(staged, 0) < room, staged, fetch),
            ),
        )
    for place, counter in enumerate((fetches, staged, left)):
        store(places.totals, place, load(counter, 0))


def _stage(number: Expr, places: Places, has_room: Expr, staged: Buffer, fetch: object) -> None:
    assert callable(fetch)
    with when(has_room):
        fetch(number, places.stage, load(staged, 0), staged)
