"""What is computed of an expert, for any cut of its rows: products with its matrices, activation, weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.layout.experts import layout
from moec.compiler.kernels import activation
from moec.compiler.kernels.cpu.dot import Columns
from moec.compiler.kernels.cpu.grouping import is_expert
from moec.compiler.kernels.cpu.math import VectorMath
from moec.compiler.kernels.cpu.numeric import widen
from moec.compiler.kernels.cpu.packed import RowPlace
from moec.compiler.kernels.cpu.rounding import Rounded, round_vectors
from moec.compiler.kernels.cpu.weights import memory_at, weights
from moec.compiler.kernels.emit import (
    Buffer,
    Expr,
    at_address,
    div,
    i64,
    keep,
    load,
    loop,
    registers,
    scope,
    splat,
    store,
    when,
)

if TYPE_CHECKING:
    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.cpu.machine import Machine
    from moec.compiler.kernels.cpu.tiling import Open, Tile


@dataclass(frozen=True)
class ExpertTensors:
    """The tensors of a call of experts, flat, and its sizes."""

    x: Buffer
    index: Buffer
    weight: Buffer
    table: Buffer
    out: Buffer
    tokens: Expr
    chosen: Expr
    experts: Expr


@dataclass(frozen=True)
class Group:
    """Some pairs of one expert: places ``start .. start+count-1`` of the order."""

    address: Expr
    start: Expr
    count: Expr


@dataclass(frozen=True)
class Source:
    """Float32 vectors, and which of them belongs to a place of the order."""

    buffer: Buffer
    row: Callable[[Expr], Expr]
    rounded: Rounded | None = None
    """The same vectors, where products with few of them take those."""


Writer = Callable[[Expr, Expr, Expr], None]
"""Takes a row number within the cut, a place of the order, and the value."""


@dataclass(frozen=True)
class Cover:
    """How a product goes over a cut of rows (see ``tiling``)."""

    go: Callable[[Expr, Open], None]
    """Takes a number of columns and what opens rows."""
    stream_rows: int
    """That are open at once where columns are few."""
    block_rows: int = 0
    """That are open at once where they are many."""
    ahead: Sequence[int] | None = None
    """Cache lines before a row that memory is asked for it, each time; None: the kernels' own choice."""


class ExpertParts:
    """Emits the parts of an expert's arithmetic."""

    def __init__(self, body: ExpertBody, machine: Machine) -> None:
        self.body, self.machine = body, machine
        self.layout = layout(body)

    def round_vectors(
        self, depth: int, vectors: Buffer, count: Expr, *, together: bool = False
    ) -> Rounded | None:
        """``count`` vectors of ``depth`` as products with few of them take them, if not as they are."""
        name = self.body.format or self.body.dtype
        return round_vectors(name, depth, self.machine, vectors, count, together=together)

    def product(
        self,
        writers: dict[str, Writer],
        group: Group,
        first: Expr,
        source: Source,
        cover: Cover,
    ) -> None:
        """Rows from ``first`` of one or several parts of one shape times the group's vectors, plus the parts' biases.

        Args:
            writers: by part.
            group: whose vectors.
            first: row.
            source: of the vectors.
            cover: goes over the rows; of each number there is the row of every part.
        """
        begins = {part: self.layout.part(part).offset_bytes for part in writers}
        depth = self.body.intermediate if "down" in writers else self.body.hidden
        biases = {part: self.bias_of(part, group.address) for part in writers}

        def open_rows(numbers: list[Expr], often: bool) -> Tile:
            rows = [(part, number) for number in numbers for part in writers]
            places = [RowPlace(begins[part], keep(first + number)) for part, number in rows]
            dots = matrices.open(places, often)

            def tile(columns: list[Expr]) -> None:
                wanted = [keep(group.start + column) for column in columns]
                numbers = [keep(source.row(place)) for place in wanted]
                starts = [keep(number * i64(depth)) for number in numbers]
                vectors = Columns(source.buffer, starts, numbers)
                for (part, number), row_sums in zip(rows, dots(vectors), strict=True):
                    shift = biases[part](first + number)
                    for place, value in zip(wanted, row_sums, strict=True):
                        writers[part](number, place, value if shift is None else value + shift)

            return tile

        with scope():
            matrices = weights(
                memory_at(group.address, self.layout.stride_bytes),
                self.body.format or self.body.dtype,
                depth,
                self.machine,
                stream_rows=cover.stream_rows * len(writers),
                block_rows=cover.block_rows * len(writers),
                ahead=cover.ahead,
                rounded=source.rounded,
            )
            cover.go(group.count, open_rows)

    def bias_of(self, part: str, address: Expr) -> Callable[[Expr], Expr | None]:
        """What is added to a row's results, if anything, of the expert at an address."""
        if not (self.body.down_bias if part == "down" else self.body.up_bias):
            return lambda row: None  # noqa: ARG005
        place = self.layout.part(f"{part}_bias")
        return self.bias_at(address + i64(place.offset_bytes), place.shape[0])

    def bias_at(self, address: Expr, rows: int) -> Callable[[Expr], Expr]:
        """Numbers of rows that lie at an address."""
        buffer, native = at_address(address, rows, self.body.dtype), self.machine.native_f16
        return lambda row: keep(widen(buffer, self.body.dtype, row, 1, native_f16=native))

    def activate(self, buffers: dict[str, Buffer], stride: int, count: Expr) -> None:
        """``up = activation(gate, up)`` in place, in whole vectors; lanes beyond the rows are never used."""
        lanes = self.machine.lanes
        with loop(count * i64(stride // lanes)) as step:
            place = step * i64(lanes)
            variables = {part: keep(load(buffer, place, lanes)) for part, buffer in buffers.items()}
            store(buffers["up"], place, self.activation(variables), lanes)

    def activation(self, variables: dict[str, Expr]) -> Expr:
        """Of vectors."""
        math = VectorMath(self.machine.lanes)
        return activation.emit(self.body.activation, variables, math.operators(), math.constant)

    def combine(
        self, call: ExpertTensors, token: Expr, results: Buffer, stride: int, first: Expr, rows: int | Expr
    ) -> None:
        """The weighted sum over one token's choices, for rows from ``first``; ``results`` is ``[pairs, stride]``."""
        lanes = self.machine.lanes
        whole = rows // lanes if isinstance(rows, int) else keep(div(rows, lanes))
        done = whole * lanes if isinstance(whole, int) else keep(whole * i64(lanes))
        with loop(whole) as step:
            self._combine_vector(call, token, results, stride, first, step * i64(lanes), lanes)
        with loop(rows - done) as step:
            number = step + (i64(done) if isinstance(done, int) else done)
            self._combine_vector(call, token, results, stride, first, number, 1)

    def _combine_vector(
        self,
        call: ExpertTensors,
        token: Expr,
        results: Buffer,
        stride: int,
        first: Expr,
        row: Expr,
        lanes: int,
    ) -> None:
        total = registers(lanes)
        store(total, 0, splat(0.0, lanes), lanes)
        with loop(call.chosen) as choice:
            pair = keep(token * call.chosen + choice)
            with when(is_expert(load(call.index, pair), call.experts)):
                weight = keep(load(call.weight, pair))
                value = load(results, pair * i64(stride) + row, lanes)
                store(total, 0, load(total, 0, lanes) + splat(weight, lanes) * value, lanes)
        place = token * i64(self.body.hidden) + first + row
        store(call.out, place, load(total, 0, lanes), lanes)


def writer(target: Buffer, stride: int, row: Callable[[Expr], Expr]) -> Writer:
    """Writes a value at ``[row(place), number]`` of a buffer with rows of ``stride``."""

    def write(number: Expr, place: Expr, value: Expr) -> None:
        store(target, row(place) * i64(stride) + number, value)

    return write
