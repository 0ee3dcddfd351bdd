"""A row of every tensor that a region makes, for one token: emitted from its stages, by the threads of one block.

A stage is written to memory where others share what is costly in it, or combine it; otherwise it is computed anew
wherever it is read, as an expression. What crosses a barrier of the block lies in shared memory.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda import primitives as gpu
from moec.compiler.kernels.cuda.primitives import i32
from moec.compiler.kernels.cuda.rows.reduce import RowReduction, emit_reduction
from moec.compiler.kernels.cuda.rows.topk import RowTopK, emit_topk
from moec.compiler.kernels.cuda.rows.values import flat_place, narrowed, rebuild, split_place
from moec.compiler.kernels.cuda.threads import read, write
from moec.compiler.kernels.emit import Buffer, Expr, i64, load, loop, store, when
from moec.compiler.kernels.rows.region import FLOATS
from moec.compiler.kernels.rows.stages import Key, Stage, Tensor, TopK, View

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from moec.compiler.kernels.rows.region import Region

AT_ONCE = 4
"""Elements that a thread of a kernel for many rows computes before it writes the first: their reads are under way
together."""


@dataclass(frozen=True)
class Place:
    """What a block computes: a token's row, or a piece of it."""

    token: Expr
    """int32."""
    piece: int | Expr = 0
    pieces: int = 1


class RowBlock:
    """The stages of a region, while they are emitted for one token.

    Args:
        region: what to compute.
        arguments: the global buffer of every tensor that the region reads or writes.
        tokens: T, int64.
        place: the block's part.
        thread: int32.
        threads: of the block, a multiple of 32.
        writes: whether this block writes to global memory; ``None``: it does.
        at_once: elements that a thread computes before it writes the first of them.
        memory: shared memory that the kernel has for tensors already.
        also: what else is done with each element of a tensor (its place in the row, int32, and its value).
    """

    def __init__(
        self,
        region: Region,
        arguments: Mapping[Key, Buffer],
        tokens: Expr,
        place: Place,
        thread: Expr,
        threads: int,
        writes: Expr | None = None,
        at_once: int = 1,
        memory: Mapping[Key, Buffer] | None = None,
        also: Mapping[Key, Callable[[Expr, Expr], None]] | None = None,
    ) -> None:
        self.writes, self.at_once, self.memory, self.also = writes, at_once, memory or {}, also or {}
        self.region, self.arguments, self.tokens, self.token = region, arguments, tokens, place.token
        self.place = place
        self.thread, self.threads = thread, threads
        self.shared: dict[Key, Buffer] = {}
        self.done: set[Key] = set()
        """Outputs that are in global memory already, to be read by others of this block."""

    def preload(self) -> None:
        """Read small weights of the region to shared memory: they are there before the kernel's other inputs are."""
        loaded = False
        for key in self.region.preloaded:
            tensor = self.region.tensors[key]
            count = math.prod(tensor.row)
            held = self.memory[key] if key in self.memory else room_of(tensor)
            self.shared[key] = held

            def value(place: Expr, key: Key = key, tensor: Tensor = tensor) -> Expr:
                return self._read(key, tensor, split_place(tensor, place, self.token))

            def keep(place: Expr, found: Expr, held: Buffer = held) -> None:
                store(held, place, found)

            self._each(count, value, keep, self.thread, self.threads)
            loaded = True
        if loaded:
            gpu.sync()

    def emit(self) -> None:
        """Compute everything that must be in memory, in order."""
        for key in self.region.order:
            definition = self.region.definitions[key]
            if isinstance(definition, TopK):
                self._topk(definition)
            elif isinstance(definition, Stage) and definition.reduction is not None:
                self._reduce(definition)
            else:
                self._fill(key)
            if key != self.region.order[-1]:
                gpu.sync()

    def element(self, key: Key, indices: Sequence[Expr]) -> Expr:
        """The value of one element of this token's row; ``indices`` are int32, the token axis's is not looked at."""
        tensor = self.region.tensors[key]
        if key in self.shared:
            return load(self.shared[key], flat_place(tensor, indices))
        if key in self.done or key not in self.region.definitions:
            return self._read(key, tensor, indices)
        return self._define(key, indices)

    def _define(self, key: Key, indices: Sequence[Expr]) -> Expr:
        """An element computed here."""
        definition = self.region.definitions[key]
        if isinstance(definition, View):
            row = flat_place(self.region.tensors[key], indices)
            return self.element(definition.source, split_place(definition.source_tensor, row, self.token))
        assert isinstance(definition, Stage)
        return self.value(definition, dict(zip(definition.axes, indices, strict=True)))

    def value(self, stage: Stage, axes: dict[Any, Expr]) -> Expr:
        """A stage's expression where its axes have these values."""
        return rebuild(
            stage.value, axes, lambda buffer, indices: self.element(stage.sources[buffer], indices)
        )

    def _read(self, key: Key, tensor: Tensor, indices: Sequence[Expr]) -> Expr:
        buffer, place = self.arguments[key], self._offset(tensor, indices)
        if tensor.dtype in FLOATS:
            return read(buffer, tensor.dtype, place)
        value = load(buffer, place)
        return T.cast(value, "int32") if tensor.dtype == "int64" else value

    def _offset(self, tensor: Tensor, indices: Sequence[Expr]) -> Expr:
        """Place in global memory, int64."""
        place: Expr = i64(0)
        for extent, index in zip(tensor.shape, indices, strict=True):
            if extent is None:
                place = place * self.tokens + i64(self.token)
            elif extent != 1:
                place = place * i64(extent) + i64(narrowed(index) if self.at_once > 1 else index)
        return place

    def _keep(self, key: Key, row_place: Expr, value: Expr) -> None:
        """Write one element to where others look for it."""
        tensor = self.region.tensors[key]
        if key in self.shared:
            store(self.shared[key], row_place, T.cast(value, self.shared[key].dtype))
        if key in self.arguments:
            with when(self.writes) if self.writes is not None else nullcontext():
                self._write(key, tensor, row_place, value)
        if key in self.also:
            self.also[key](row_place, value)

    def _write(self, key: Key, tensor: Tensor, row_place: Expr, value: Expr) -> None:
        place = self._offset(tensor, split_place(tensor, row_place, self.token))
        if tensor.dtype in FLOATS:
            write(self.arguments[key], tensor.dtype, place, T.cast(value, "float32"))
        else:
            store(self.arguments[key], place, T.cast(value, tensor.dtype))

    def _share(self, key: Key) -> None:
        """Room in shared memory for what others of this block read, unless they read it from global memory."""
        tensor = self.region.tensors[key]
        if key in self.memory:
            self.shared[key] = self.memory[key]
        elif key in self.region.shared:
            self.shared[key] = room_of(tensor)

    def _settle(self, key: Key) -> None:
        if key not in self.shared:
            self.done.add(key)

    def each(self, count: int, value: Callable[[Expr], Expr], keep: Callable[[Expr, Expr], None]) -> None:
        """``keep(place, value(place))`` for all places of the block's piece of a row.

        A thread may compute several values before it keeps the first: none may depend on one that is kept.
        """
        own = self.thread
        if self.place.pieces > 1:
            own = T.bind(i32(self.place.piece) * i32(self.threads) + self.thread)
        self._each(count, value, keep, own, self.threads * self.place.pieces)

    def _each(
        self,
        count: int,
        value: Callable[[Expr], Expr],
        keep: Callable[[Expr, Expr], None],
        own: Expr,
        together: int,
    ) -> None:
        def turn(step: Expr, turns: int) -> None:
            places = [T.bind(step + i32(number * together) + own) for number in range(turns)]
            for place, found in [(place, T.bind(value(place))) for place in places]:
                keep(place, found)

        whole, rest = divmod(count, together)
        turns, last = divmod(whole, self.at_once)
        if turns:
            with loop(turns) as step:
                turn(i32(step) * i32(self.at_once * together), self.at_once)
        if last:
            turn(i32(turns * self.at_once * together), last)
        if rest:
            with when(own < i32(rest)):
                turn(i32(whole * together), 1)

    def _fill(self, key: Key) -> None:
        tensor = self.region.tensors[key]
        self._share(key)
        self.each(
            math.prod(tensor.row),
            lambda place: self._define(key, split_place(tensor, place, self.token)),
            lambda place, value: self._keep(key, place, value),
        )
        self._settle(key)

    def _reduce(self, stage: Stage) -> None:
        self._share(stage.key)
        emit_reduction(self._row_reduction(stage), self.thread, self.threads)
        self._settle(stage.key)

    def _row_reduction(self, stage: Stage) -> RowReduction:
        assert stage.reduction is not None
        inner, extents = zip(*stage.reduction.axes, strict=True)
        row = Tensor(extents, "int32")

        def reader(place: Expr) -> Callable[[Expr], Expr]:
            axes = dict(zip(stage.axes, split_place(stage.tensor, place, self.token), strict=True))

            def read(number: Expr) -> Expr:
                own = dict(zip(inner, split_place(row, number, self.token), strict=True))
                return self.value(stage, axes | own)

            return read

        return RowReduction(
            stage.reduction.kind,
            math.prod(stage.tensor.row),
            math.prod(extents),
            reader,
            lambda place, value: self._keep(stage.key, place, value),
        )

    def _topk(self, stage: TopK) -> None:
        for key in stage.keys:
            self._share(key)
        emit_topk(self._row_topk(stage), self.thread, self.threads)
        for key in stage.keys:
            self._settle(key)

    def _row_topk(self, stage: TopK) -> RowTopK:
        *outer, entries = stage.source_tensor.row

        def read_entry(place: Expr) -> Expr:
            return self.element(stage.source, split_place(stage.source_tensor, place, self.token))

        def keep(place: Expr, value: Expr, entry: Expr) -> None:
            self._keep(stage.keys[0], place, value)
            self._keep(stage.keys[1], place, entry)

        return RowTopK(math.prod(outer), entries, stage.count, read_entry, keep)


def room_of(tensor: Tensor) -> Buffer:
    """Shared memory for a row of it."""
    return gpu.shared(math.prod(tensor.row) or 1, "float32" if tensor.dtype in FLOATS else "int32")
