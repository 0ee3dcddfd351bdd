"""Experts that many tokens chose: their vectors are rounded once, before each of both products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.pairs.strip import Results, Strip, Strips
from moec.compiler.kernels.cpu.pairs.vectors import new_vectors, rounded
from moec.compiler.kernels.cpu.weights import memory_at
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    ceildiv,
    div,
    i64,
    keep,
    load,
    loop,
    scope,
    scratch,
    store,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.cpu.expert_parts import ExpertParts, ExpertTensors
    from moec.compiler.kernels.cpu.grouping import Groups

STRIP_PAIRS = 64
"""Of one expert whose activations a thread keeps in its second-level cache."""


class PairExperts:
    """Emits the work of one call."""

    def __init__(self, parts: ExpertParts, call: ExpertTensors, groups: Groups) -> None:
        self.parts, self.call, self.groups = parts, call, groups
        self.body, self.lanes = parts.body, parts.machine.lanes
        self.few_pairs = groups.few_pairs
        self.middle = new_vectors(self.body.intermediate, keep(groups.pairs - self.few_pairs))
        """``activation(gate, up)`` of these experts' pairs, in their order."""

    def gather(self) -> None:
        """The tokens' vectors, if any expert wants them, before ``gate_up``."""
        many = self.groups.active > self.groups.few
        tokens = keep(T.Select(many, self.call.tokens, i64(0)))
        hidden = self.body.hidden
        self.x = rounded(self.call.x, lambda token: token * i64(hidden), hidden, tokens, parallel=True)

    def gate_up(self, expert: Expr, first: Expr, rows: int) -> None:
        """``middle`` of an expert's pairs, for rows from ``first``."""
        names = ("gate", "up") if self.body.gated else ("up",)
        stride = -(-rows // self.lanes) * self.lanes
        size = STRIP_PAIRS * stride
        with scope():
            results = scratch(len(names) * size)
            activated = scratch(stride)

            def emit(begin: Expr, count: Expr) -> None:
                Strip(
                    self._strips(names, expert, first, rows),
                    self.x,
                    lambda place: div(self.groups.pair(begin + place), self.call.chosen),
                    count,
                    Results(results, lambda part, place: place * i64(stride) + i64(part * size)),
                ).emit()
                with loop(count) as place:
                    with loop(stride // self.lanes) as step:
                        begin_of = place * i64(stride) + step * i64(self.lanes)
                        variables = {
                            name: keep(load(results, begin_of + i64(part * size), self.lanes))
                            for part, name in enumerate(names)
                        }
                        value = self.parts.activation(variables)
                        store(activated, step * i64(self.lanes), value, self.lanes)
                    number = keep(begin + place - self.few_pairs)
                    self.middle.store(number, first, activated, i64(0), rows)

            self._some(expert, emit)

    def round_middle(self) -> None:
        """Nothing: what the last product takes was rounded when it was stored."""

    def down(self, expert: Expr, first: Expr, rows: int, results: Buffer) -> None:
        """``results[pair, row]`` of an expert's pairs, for rows from ``first``."""

        def emit(begin: Expr, count: Expr) -> None:
            Strip(
                self._strips(("down",), expert, first, rows),
                self.middle,
                lambda place: begin + place - self.few_pairs,
                count,
                Results(results, lambda _, place: self.groups.pair(begin + place) * i64(rows)),
            ).emit()

        self._some(expert, emit)

    def _some(self, expert: Expr, emit: Callable[[Expr, Expr], None]) -> None:
        """Call ``emit(first place, count)`` for the pairs of an expert, so many at a time as a cache holds."""
        start, size = keep(self.groups.start(expert)), keep(self.groups.size(expert))
        with loop(ceildiv(size, STRIP_PAIRS)) as number:
            done = keep(number * i64(STRIP_PAIRS))
            emit(keep(start + done), keep(T.min(i64(STRIP_PAIRS), size - done)))

    def _strips(self, names: tuple[str, ...], expert: Expr, first: Expr, rows: int) -> Strips:
        columns = self.body.intermediate if names == ("down",) else self.body.hidden
        address = self._address(expert)
        following = self._address(T.min(expert + i64(1), self.groups.active - i64(1)))
        begins = [
            keep(first * i64(columns) + i64(self.parts.layout.part(name).offset_bytes // 2)) for name in names
        ]
        biases = {name: self.parts.bias_of(name, address) for name in names}
        return Strips(
            memory_at(address, self.parts.layout.stride_bytes)("bfloat16"),
            begins,
            rows,
            columns,
            keep(begins[0] + T.shift_right(following - address, i64(1))),
            lambda part, row: biases[names[part]](first + row),
        )

    def _address(self, expert: Expr) -> Expr:
        return keep(load(self.call.table, self.groups.expert(expert)))
