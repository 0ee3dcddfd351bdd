"""The calls of routed experts: on the CPU each makes its experts resident, then runs them where they are."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from moec.artifacts.model import DTYPE_BYTES
from moec.runtime.device import HostCall, View
from moec.runtime.tensors import ALIGNMENT_BYTES, aligned_empty, array_at, tensor_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from moec.artifacts.program import Beside
    from moec.runtime.device import Call
    from moec.runtime.experts.prefetch import Prefetcher
    from moec.runtime.experts.tables import ExpertStore
    from moec.runtime.stats import Stats


class ExpertWork(NamedTuple):
    """What the routed experts of one layer are to do in one part of a step."""

    layer: int
    """Ordinal of the MoE layer."""
    function: Callable[..., Any]
    """``function(hidden, index, weight, table, workspace..., out)``."""
    views: tuple[View, ...]
    """Hidden ``[T, H]``, index ``[T, K]`` int64, weight ``[T, K]`` and the result ``[T, H]``."""
    workspace: tuple[View, ...]
    """One view, or none; then what the function takes for the segment in front of it."""
    beside: Beside | None = None
    """Which segment that is, where ``function`` does its work too."""


class ExpertCalls(Protocol):
    """Makes the calls of routed experts for a device."""

    def runs_beside(self, beside: Beside) -> bool:
        """Whether a layer's call may do what is in front of it too."""
        ...

    def calls(self, work: ExpertWork) -> list[Call]:
        """The calls of one layer."""
        ...

    def count(self, stats: Stats) -> None:
        """Add what was counted elsewhere than in ``stats`` since the last time."""
        ...


class HostExperts:
    """Experts that the CPU runs from the mapped files."""

    def __init__(self, store: ExpertStore, prefetcher: Prefetcher | None = None) -> None:
        self._store, self._prefetcher = store, prefetcher
        self._tables: dict[int, Any] = {}

    def count(self, stats: Stats) -> None:
        """Nothing: the store counts as it goes."""

    def runs_beside(self, beside: Beside) -> bool:
        """Never: nothing would be won."""
        del beside
        return False

    def calls(self, work: ExpertWork) -> list[Call]:
        """See `ExpertCalls.calls`."""
        assert work.beside is None
        layer, function, views = work.layer, work.function, work.views
        if layer not in self._tables:
            self._tables[layer] = self._store.table(layer)
        table, extra = self._tables[layer], tuple(tensor_at(*view) for view in work.workspace)
        hidden, index, weight, out = (tensor_at(*view) for view in views)
        states, choices = (array_at(*view) for view in views[:2])
        store = self._store

        def run() -> None:
            parts = store.parts(layer, choices)
            if parts is None:
                store.use(layer, choices)
                self._look_ahead(layer, states, choices)
                function(hidden, index, weight, table, *extra, out)
                return
            for start, end in parts:
                store.use(layer, choices[start:end])
                _run_rows(function, views, (table, *extra), start, end)

        return [HostCall("experts", run)]

    def _look_ahead(self, layer: int, states: NDArray[Any], choices: NDArray[Any]) -> None:
        """Check the guess for ``layer``, and have the next layer's likely experts read while this one computes."""
        if self._prefetcher is None:
            return
        self._prefetcher.check(layer, choices)
        experts = self._prefetcher.next_experts(layer, states, choices)
        if experts:
            brought = self._store.expect(layer + 1, experts, self._prefetcher.limit)
            self._prefetcher.brought(brought, self._store.stride_bytes(layer + 1))


def _run_rows(
    function: Callable[..., Any], views: tuple[View, ...], shared: tuple[Any, ...], start: int, end: int
) -> None:
    """Run rows whose experts fit the budget; each row's result is the same as in one run of all."""
    hidden, chosen, weight, out = (RowSlice(view, start, end) for view in views)
    function(hidden.tensor, chosen.tensor, weight.tensor, *shared, out.tensor)
    out.write_back()


class RowSlice:
    """Rows ``start .. end - 1`` of a tensor ``[T, ...]`` of the host: a view where aligned, else a copy."""

    def __init__(self, view: View, start: int, end: int) -> None:
        shape = (end - start, *view.shape[1:])
        row_bytes = DTYPE_BYTES[view.dtype] * math.prod(shape[1:])
        self._address = view.address + start * row_bytes
        self._bytes = row_bytes * (end - start)
        self._copy = None
        address = self._address
        if address % ALIGNMENT_BYTES != 0:
            self._copy = aligned_empty((self._bytes,), "uint8")
            address = self._copy.ctypes.data
            ctypes.memmove(address, self._address, self._bytes)
        self.tensor = tensor_at(address, view.dtype, shape)

    def write_back(self) -> None:
        """Copy the rows back where they were copied."""
        if self._copy is not None:
            ctypes.memmove(self._address, self._copy.ctypes.data, self._bytes)
