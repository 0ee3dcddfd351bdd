"""Counting sort of (token, choice) pairs by expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.emit import Buffer, Expr, i64, keep, load, loop, scratch, store, when

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Groups:
    """Pairs (``token * K + choice``) in order of their experts, and the experts that have any."""

    active: Expr
    """How many experts have pairs."""
    experts: Buffer
    starts: Buffer
    """Where each active expert's pairs begin in ``order``, and one end after the last."""
    order: Buffer
    few: Expr
    """Of the active experts so many come first that have few pairs; the others have more."""

    def expert(self, group: Expr) -> Expr:
        """Number of the ``group``-th active expert."""
        return load(self.experts, group)

    def start(self, group: Expr) -> Expr:
        """Its first place in the order."""
        return load(self.starts, group)

    def size(self, group: Expr) -> Expr:
        """How many pairs it has."""
        return load(self.starts, group + i64(1)) - load(self.starts, group)

    @property
    def pairs(self) -> Expr:
        """How many pairs there are in the order."""
        return keep(load(self.starts, self.active))

    @property
    def few_pairs(self) -> Expr:
        """How many pairs the experts with few have; they are the first in the order."""
        return keep(load(self.starts, self.few))

    def pair(self, place: Expr) -> Expr:
        """The pair at a place of the order."""
        return load(self.order, place)


def is_expert(number: Expr, experts: Expr) -> Expr:
    """Whether an index names an expert."""
    return T.And(number >= i64(0), number < experts)


def group_by_expert(index: Buffer, pairs: Expr, experts: Expr, few: Expr | None = None) -> Groups:
    """Emit the sort; pairs whose index names no expert are left out.

    Experts with at most ``few`` pairs (int64) come before the others; None: all have few.
    """
    sizes, places = scratch(experts, "int64"), scratch(experts, "int64")
    order, active, starts = (
        scratch(pairs, "int64"),
        scratch(experts, "int64"),
        scratch(experts + i64(1), "int64"),
    )
    totals = scratch(2, "int64")
    with loop(experts) as expert:
        store(sizes, expert, i64(0))
    with loop(pairs) as pair:
        expert = keep(load(index, pair))
        with when(is_expert(expert, experts)):
            store(sizes, expert, load(sizes, expert) + i64(1))
    store(totals, i64(0), i64(0))
    store(totals, i64(1), i64(0))
    store(starts, i64(0), i64(0))

    def place(wanted: Callable[[Expr], Expr]) -> Expr:
        """Give the experts of wanted sizes their places; how many are active now."""
        with loop(experts) as expert:
            size = keep(load(sizes, expert))
            before = keep(load(totals, i64(1)))
            with when(wanted(size)):
                number = keep(load(totals, i64(0)))
                store(active, number, expert)
                store(starts, number + i64(1), before + size)
                store(places, expert, before)
                store(totals, i64(0), number + i64(1))
                store(totals, i64(1), before + size)
        return keep(load(totals, i64(0)))

    if few is None:
        first = count = place(lambda size: size > i64(0))
    else:
        first = place(lambda size: T.And(size > i64(0), size <= few))
        count = place(lambda size: size > few)
    with loop(pairs) as pair:
        expert = keep(load(index, pair))
        with when(is_expert(expert, experts)):
            place = keep(load(places, expert))
            store(order, place, pair)
            store(places, expert, place + i64(1))
    return Groups(count, active, starts, order, first)
