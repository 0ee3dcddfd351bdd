"""The routed experts in memory: address tables for the kernels, resident bytes within a budget."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.runtime.experts.residency import Residency, split_rows
from moec.runtime.tensors import aligned_empty, tensor_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moec.artifacts.schedule import Policy
    from moec.runtime.experts.residency import LayerPlan
    from moec.runtime.stats import Stats

_MADV_POPULATE_READ = 22
"""Of Linux 5.14 and later; Python's mmap has no name for it."""

_FOLIO_BYTES = 2 << 20

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class ExpertStore:
    """The mapped expert files of all MoE layers.

    An expert outside the resident set is only in the file; using it reads it through the page cache. One that
    leaves the set is unmapped from this process's resident memory at once, so that it stays within the
    budget. Where not all experts fit, those that the plans begin with are read at once; where all do, each is
    read when it is first used.

    Args:
        views: per MoE layer, ``[E, stride]`` bytes of the mapped file.
        plans: per MoE layer, what it may keep.
        stats: counts hits, misses, evictions and bytes.
        policy: who leaves.
    """

    def __init__(
        self,
        views: Sequence[NDArray[np.uint8]],
        plans: tuple[LayerPlan, ...],
        stats: Stats,
        policy: Policy,
    ) -> None:
        self._views = views
        self._stats = stats
        self._addresses = [view.ctypes.data for view in views]
        self._strides = [view.shape[1] for view in views]
        self._experts = [len(view) for view in views]
        self._complete = [False] * len(views)
        assert [(len(plan.order), plan.expert_bytes) for plan in plans] == [view.shape for view in views]
        self.residency = Residency(plans, policy)
        self._tables: list[NDArray[np.int64]] = []
        if self.residency.bounded:
            for view in views:
                # A huge page would bring an expert's neighbours in with it.
                _libc.madvise(view.ctypes.data, view.nbytes, mmap.MADV_NOHUGEPAGE)
            for layer, seeds in enumerate(self.residency.seed()):
                self._bring(layer, seeds)
                stats.bytes_moved += len(seeds) * self._strides[layer]

    def table(self, layer: int) -> Any:
        """Addresses of the experts of ``layer``, int64 ``[E]``, as kernels take them."""
        table = aligned_empty((self._experts[layer],), np.int64)
        table[:] = self._addresses[layer] + np.arange(self._experts[layer]) * self._strides[layer]
        self._tables.append(table)
        return tensor_of(table)

    def parts(self, layer: int, index: NDArray[np.int64]) -> tuple[tuple[int, int], ...] | None:
        """Row ranges of a step that must run one after the other; ``None``: all at once.

        Args:
            layer: ordinal of the MoE layer.
            index: chosen experts ``[T, K]``.
        """
        capacity = self.residency.capacity(layer)
        if index.size <= capacity or self._experts[layer] <= capacity:
            return None
        ranges = split_rows(index, self._experts[layer], capacity)
        return ranges if len(ranges) > 1 else None

    def use(self, layer: int, index: NDArray[np.int64]) -> None:
        """Make the experts that ``index`` ``[T, K]`` names resident and count hits and misses."""
        experts, stats = self._experts[layer], self._stats
        if self._complete[layer] and len(index) == 1:
            stats.hits += sum(0 <= expert < experts for expert in index[0].tolist())
            return
        chosen = index.ravel()
        chosen = chosen[(chosen >= 0) & (chosen < experts)]
        if len(index) == 1:
            ids = np.array(list(dict.fromkeys(chosen.tolist())), np.int64)
            counts = np.ones_like(ids)
        else:
            ids, counts = np.unique(chosen, return_counts=True)
        if self._complete[layer]:
            stats.hits += ids.size
            return
        change = self.residency.use(layer, ids, counts, len(index))
        stats.misses += len(change.missed)
        stats.hits += ids.size - len(change.missed)
        stats.bytes_moved += change.bytes_moved
        stats.evictions += len(change.evicted)
        for evicted_layer, expert in change.evicted:
            self._advise(evicted_layer, expert, expert + 1, mmap.MADV_DONTNEED)
        self._bring(layer, change.missed)
        if change.missed and not self.residency.bounded:
            self._complete[layer] = bool(self.residency.resident[layer].all())

    def expect(self, layer: int, experts: Sequence[int], most: int) -> list[int]:
        """Have the system read those of ``experts`` that are not resident, at most ``most``, without waiting for it.

        They are in its page cache then, and not in this process's memory.

        Returns:
            Which these are.
        """
        if not self.residency.bounded:
            return []
        resident = self.residency.resident[layer]
        absent = [expert for expert in experts if not resident[expert]][:most]
        for expert in absent:
            self._advise(layer, expert, expert + 1, mmap.MADV_WILLNEED)
        return absent

    def stride_bytes(self, layer: int) -> int:
        """What one expert of ``layer`` occupies."""
        return int(self._strides[layer])

    def _bring(self, layer: int, experts: tuple[int, ...]) -> None:
        """Have the system read ``experts``; in a bounded set also map them, and nothing else."""
        for expert in experts:
            self._advise(layer, expert, expert + 1, mmap.MADV_WILLNEED)
        if self.residency.bounded:
            self._map_exactly(layer, experts)

    def _map_exactly(self, layer: int, missed: tuple[int, ...]) -> None:
        """Map experts now and drop what came along.

        A page fault maps the whole folio of the page cache, up to 2 MiB (Linux 6.18), neighbours included.
        """
        resident = self.residency.resident[layer]
        reach = -(-_FOLIO_BYTES // self._strides[layer])
        for expert in missed:
            if not self._advise(layer, expert, expert + 1, _MADV_POPULATE_READ):
                return
            last = min(self._experts[layer], expert + reach + 1)
            outside = [other for other in range(max(0, expert - reach), last) if not resident[other]]
            for first, end in _runs(outside):
                self._advise(layer, first, end, mmap.MADV_DONTNEED)

    def _advise(self, layer: int, first: int, end: int, advice: int) -> bool:
        """Advise the system about experts ``first .. end-1``; False where it does not know the advice."""
        stride = self._strides[layer]
        address = self._addresses[layer] + first * stride
        result: int = _libc.madvise(address, (end - first) * stride, advice)
        return result == 0


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Increasing numbers as ranges ``(first, end)``."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
