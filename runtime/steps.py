"""One bound call for each kind of step of the chain: function, weights and value places looked up once."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from moec.artifacts.model import DTYPE_BYTES
from moec.runtime.tensors import ALIGNMENT_BYTES, tensor_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from moec.artifacts.model import TensorSpec
    from moec.runtime.experts import ExpertStore
    from moec.runtime.routing import RoutingRecorder


class Frame:
    """The values of one step while it runs, and what the cache kernels need to know about its tokens."""

    __slots__ = ("count", "page_table", "recorder", "token_position", "token_sequence", "values")

    def __init__(
        self,
        values: list[Any],
        count: int,
        page_table: Any,
        token_sequence: Any,
        token_position: Any,
        recorder: RoutingRecorder | None,
    ) -> None:
        self.values = values
        self.count = count
        self.page_table = page_table
        self.token_sequence = token_sequence
        self.token_position = token_position
        self.recorder = recorder


class Allocator:
    """Makes the tensors that kernels write to; shapes are kept as TVM objects for each token count."""

    def __init__(self) -> None:
        import tvm_ffi

        self.item = tvm_ffi.get_global_func("ffi.ArrayGetItem")
        """``item(results, n)``: a third of the time of ``results[n]``."""
        self._allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._shape = tvm_ffi.Shape
        self._dtype = tvm_ffi.dtype
        self._device = tvm_ffi.device("cpu", 0)
        self._dtypes: dict[str, Any] = {}
        self._shapes: dict[tuple[TensorSpec, int], Any] = {}

    def empty(self, spec: TensorSpec, count: int) -> Any:
        """An uninitialised tensor of ``spec`` with T = ``count``, 64-byte aligned."""
        shape = self._shapes.get((spec, count))
        if shape is None:
            if len(self._shapes) >= _SHAPES_KEPT:
                self._shapes.clear()
            shape = self._shapes[spec, count] = self._shape(resolve(spec, count))
            self._dtypes.setdefault(spec.dtype, self._dtype(spec.dtype))
        return self._allocate(shape, self._dtypes[spec.dtype], self._device, None)


_SHAPES_KEPT = 4096


def resolve(spec: TensorSpec, count: int) -> tuple[int, ...]:
    """The shape of ``spec`` with T = ``count``."""
    return tuple(count if extent == "T" else extent for extent in spec.shape)


class SegmentCall:
    """A dense segment."""

    stage = "segments"
    __slots__ = ("_freed", "_function", "_inputs", "_item", "_outputs", "_weights")

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: list[int],
        weights: list[Any],
        outputs: list[int],
        item: Callable[[Any, int], Any],
        freed: list[int],
    ) -> None:
        self._function = function
        self._item = item
        self._inputs = inputs
        self._weights = weights
        self._outputs = outputs
        self._freed = freed

    def run(self, frame: Frame) -> None:
        """Run it on the frame's values."""
        values = frame.values
        results = self._function(*[values[place] for place in self._inputs], *self._weights)
        for number, place in enumerate(self._outputs):
            values[place] = self._item(results, number)
        for place in self._freed:
            values[place] = None


class AttentionCall:
    """Append to one layer's cache, then attend."""

    stage = "attention"
    __slots__ = (
        "_allocator",
        "_append",
        "_attend",
        "_cache",
        "_freed",
        "_kv",
        "_output",
        "_query",
        "_sinks",
        "_spec",
    )

    def __init__(
        self,
        append: Callable[..., Any],
        attend: Callable[..., Any],
        cache: tuple[Any, ...],
        query: int,
        kv: list[int],
        sinks: tuple[Any, ...],
        output: int,
        spec: TensorSpec,
        allocator: Allocator,
        freed: list[int],
    ) -> None:
        self._append = append
        self._attend = attend
        self._cache = cache
        self._query = query
        self._kv = kv
        self._sinks = sinks
        self._output = output
        self._spec = spec
        self._allocator = allocator
        self._freed = freed

    def run(self, frame: Frame) -> None:
        """Run it on the frame's values."""
        values, cache = frame.values, self._cache
        where = (frame.page_table, frame.token_sequence, frame.token_position)
        self._append(*[values[place] for place in self._kv], *cache, *where)
        out = self._allocator.empty(self._spec, frame.count)
        self._attend(values[self._query], *cache, *where, *self._sinks, out)
        values[self._output] = out
        for place in self._freed:
            values[place] = None


class ExpertsCall:
    """The routed experts of one layer."""

    stage = "experts"
    __slots__ = (
        "_allocator",
        "_freed",
        "_function",
        "_hidden",
        "_index",
        "_layer",
        "_output",
        "_spec",
        "_specs",
        "_store",
        "_table",
        "_weight",
    )

    def __init__(
        self,
        function: Callable[..., Any],
        layer: int,
        store: ExpertStore,
        places: tuple[int, int, int, int],
        specs: tuple[TensorSpec, TensorSpec, TensorSpec, TensorSpec],
        allocator: Allocator,
        freed: list[int],
    ) -> None:
        self._function = function
        self._layer = layer
        self._store = store
        self._table = store.table(layer)
        self._hidden, self._index, self._weight, self._output = places
        self._specs = specs
        self._spec = specs[3]
        self._allocator = allocator
        self._freed = freed

    def run(self, frame: Frame) -> None:
        """Run it on the frame's values."""
        values = frame.values
        hidden, chosen, weight = values[self._hidden], values[self._index], values[self._weight]
        index = cast("NDArray[np.int64]", np.from_dlpack(chosen))
        out = self._allocator.empty(self._spec, frame.count)
        if frame.recorder is not None:
            frame.recorder.record(self._layer, index, cast("NDArray[np.float32]", np.from_dlpack(weight)))
        parts = self._store.parts(self._layer, index)
        if parts is None:
            self._store.use(self._layer, index)
            self._function(hidden, chosen, weight, self._table, out)
        else:
            self._run_parts(parts, index, (hidden, chosen, weight, out))
        values[self._output] = out
        for place in self._freed:
            values[place] = None

    def _run_parts(
        self, parts: tuple[tuple[int, int], ...], index: NDArray[np.int64], tensors: tuple[Any, Any, Any, Any]
    ) -> None:
        """Run rows in groups whose experts fit the budget; each row's result is the same as in one run."""
        for start, end in parts:
            self._store.use(self._layer, index[start:end])
            hidden, chosen, weight, out = (
                RowSlice(self._allocator, tensor, spec, start, end)
                for tensor, spec in zip(tensors, self._specs, strict=True)
            )
            self._function(hidden.tensor, chosen.tensor, weight.tensor, self._table, out.tensor)
            out.write_back()


class RowSlice:
    """Rows ``start .. end - 1`` of a tensor ``[T, ...]``: a view where aligned, else a copy."""

    def __init__(self, allocator: Allocator, tensor: Any, spec: TensorSpec, start: int, end: int) -> None:
        shape = resolve(spec, end - start)
        row_bytes = DTYPE_BYTES[spec.dtype] * math.prod(shape[1:])
        self._address = tensor.data_ptr() + start * row_bytes
        self._bytes = row_bytes * (end - start)
        self._copied = self._address % ALIGNMENT_BYTES != 0
        if self._copied:
            self.tensor = allocator.empty(spec, end - start)
            ctypes.memmove(self.tensor.data_ptr(), self._address, self._bytes)
        else:
            self.tensor = tensor_at(self._address, spec.dtype, shape)

    def write_back(self) -> None:
        """Copy the rows back where they were copied."""
        if self._copied:
            ctypes.memmove(self._address, self.tensor.data_ptr(), self._bytes)


Call: TypeAlias = SegmentCall | AttentionCall | ExpertsCall
