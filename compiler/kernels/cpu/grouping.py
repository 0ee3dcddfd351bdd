"""Counting sort of (token, choice) pairs by expert."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.emit import Buffer, Expr, i64, keep, load, loop, scratch, store, when


@dataclass(frozen=True)
class Groups:
    """Pairs (``token * K + choice``) in order of their experts, and the experts that have any."""

    active: Expr
    """How many experts have pairs."""
    experts: Buffer
    starts: Buffer
    """Where each active expert's pairs begin in ``order``, and one end after the last."""
    order: Buffer

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

    def pair(self, place: Expr) -> Expr:
        """The pair at a place of the order."""
        return load(self.order, place)


def is_expert(number: Expr, experts: Expr) -> Expr:
    """Whether an index names an expert."""
    return T.And(number >= i64(0), number < experts)


def group_by_expert(index: Buffer, pairs: Expr, experts: Expr) -> Groups:
    """Emit the sort; pairs whose index names no expert are left out."""
    places = scratch(experts, "int64")
    order, active, starts = (
        scratch(pairs, "int64"),
        scratch(experts, "int64"),
        scratch(experts + i64(1), "int64"),
    )
    totals = scratch(2, "int64")
    with loop(experts) as expert:
        store(places, expert, i64(0))
    with loop(pairs) as pair:
        expert = keep(load(index, pair))
        with when(is_expert(expert, experts)):
            store(places, expert, load(places, expert) + i64(1))
    store(totals, i64(0), i64(0))
    store(totals, i64(1), i64(0))
    store(starts, i64(0), i64(0))
    with loop(experts) as expert:
        size = keep(load(places, expert))
        before = keep(load(totals, i64(1)))
        with when(size > i64(0)):
            number = keep(load(totals, i64(0)))
            store(active, number, expert)
            store(starts, number + i64(1), before + size)
            store(places, expert, before)
            store(totals, i64(0), number + i64(1))
            store(totals, i64(1), before + size)
    with loop(pairs) as pair:
        expert = keep(load(index, pair))
        with when(is_expert(expert, experts)):
            place = keep(load(places, expert))
            store(order, place, pair)
            store(places, expert, place + i64(1))
    return Groups(keep(load(totals, i64(0))), active, starts, order)
