"""The calls of experts that the GPU caches by itself: a few tokens in one graph, many as a stream of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from moec.artifacts.words.slots import MOST_CACHED_TOKENS
from moec.runtime.device import HostCall, PackedCall

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from moec.artifacts.program import Beside
    from moec.runtime.device import Call, View
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.offload.ahead import ExpertsAhead
    from moec.runtime.devices.cuda.offload.feeding import CopyFeeder
    from moec.runtime.devices.cuda.offload.files import FileExperts
    from moec.runtime.devices.cuda.offload.host_tier import HostTier
    from moec.runtime.devices.cuda.offload.slots import DeviceSlots
    from moec.runtime.devices.cuda.offload.stream import LayerStream
    from moec.runtime.devices.cuda.offload.stream_share import StreamShare
    from moec.runtime.devices.cuda.uploading.weights import ResidentWeights
    from moec.runtime.experts.calls import ExpertWork
    from moec.runtime.stats import Stats

STAGE = "experts"


class Helper(Protocol):
    """Whoever computes a share of the missing experts while the GPU fetches the others."""

    def post(self, layer: int, hidden: View, chosen: View, weight: View) -> Sequence[Call]:
        """What tells it of its choices ``[T, K]`` (-1: none of its); must not wait for it."""
        ...

    def collect(self, layer: int, out: View) -> Sequence[Call]:
        """What adds its part to ``out`` ``[T, H]``."""
        ...


class OffloadedExperts:
    """See `moec.runtime.experts.calls.ExpertCalls`.

    Args:
        device: the GPU.
        slots: its slots and what it knows of them.
        assign: the kernel ``assign_experts``.
        fetch: the kernel ``fetch_experts``.
        cached: of each layer the kernel ``experts_cached_<body>``, ``None`` where its body has none.
        beside: the kernels that do the work of the segment in front of such experts too.
        stream: runs steps of many tokens.
        files: brings experts that are only in the file; ``None`` where all are in host memory.
        tier: the experts in host memory.
        weights: all other weights, kept with the calls: whoever holds addresses in them must hold them too.
        ahead: guesses the next layer's experts and brings pieces of them; ``None``: nobody does.
    """

    def __init__(
        self,
        device: CudaDevice,
        slots: DeviceSlots,
        assign: Callable[..., Any],
        fetch: Callable[..., Any],
        cached: Sequence[Callable[..., Any] | None],
        beside: Mapping[Beside, Callable[..., Any]],
        stream: LayerStream,
        files: FileExperts | None,
        tier: HostTier,
        weights: ResidentWeights,
        ahead: ExpertsAhead | None,
    ) -> None:
        self.tier, self.weights, self.slots, self.files = tier, weights, slots, files
        self.ahead = ahead
        self.helper: Helper | None = None
        self.feeder: CopyFeeder | None = None
        """Brings missing experts of captured steps in place of ``fetch``; ``None``: nobody does."""
        self.beside = True
        """Whether experts of few tokens are computed as they arrive, or when all of a layer are there."""
        self._device = device
        self._assign, self._fetch, self._kernels, self._beside = assign, fetch, cached, beside
        self._stream = stream
        self._seen = slots.states.counters()

    def be_fed_by(self, feeder: CopyFeeder) -> None:
        """Have ``feeder`` bring missing experts from now on; no list of calls may have been made before."""
        self.feeder = feeder
        self._stream.settle = feeder.settle

    def share_streams(self, share: StreamShare) -> None:
        """Have the CPU compute its share of streamed steps; no list of calls may have been made before."""
        self._stream.share = share

    def runs_beside(self, beside: Beside) -> bool:
        """Where there is a kernel for it: the segment's first product is done while experts are on their way."""
        return beside in self._beside

    def calls(self, work: ExpertWork) -> list[Call]:
        """The calls of one layer; the host has a part in them where experts are in the file."""
        if self._stream.takes(work.layer, work.views[1].shape[0]):
            return [self._stream.call(work)]
        kernel = self._kernels[work.layer] if work.beside is None else self._beside[work.beside]
        return self._cached(work, kernel)

    def count(self, stats: Stats) -> None:
        """Add what the GPU has counted since the last time."""
        counters = self.slots.states.counters()
        new = counters - self._seen
        self._seen = counters
        for layer, (hits, misses, by_cpu, evictions, _) in zip(
            self.slots.plan.layers, new.tolist(), strict=True
        ):
            stats.hits += hits
            stats.misses += misses
            stats.cpu_misses += by_cpu
            stats.evictions += evictions
            stats.bytes_moved += (misses - by_cpu) * layer.stride_bytes
        self._stream.count(stats)
        if self.feeder is not None:
            self.feeder.count(stats)
        if self.ahead is not None:
            self.ahead.count(stats.prefetch, int(new[:, -1].sum()))

    def _bring(self, state: View) -> PackedCall:
        """What brings the missing experts of the layer with this state."""
        fetch = PackedCall(STAGE, self._fetch, (self._device.tensor(state),))
        return fetch if self.feeder is None else self.feeder.fetch(state, fetch)

    def _cached(self, work: ExpertWork, kernel: Callable[..., Any] | None) -> list[Call]:
        """Calls of ``kernel`` where experts are computed as they arrive, otherwise of the work's own function."""
        layer, (hidden, index, weight, out) = work.layer, work.views
        device, states = self._device, self.slots.states
        shape = index.shape
        own, theirs = states.choices(0, shape), states.choices(1, shape)
        state = device.tensor(states.state(layer))
        assign = (device.tensor(index), state, device.tensor(own), device.tensor(theirs))
        own_kernel = kernel if self.beside and shape[0] <= MOST_CACHED_TOKENS else None
        extra = work.workspace if own_kernel is None else (states.state(layer), *work.workspace)
        experts = map(device.tensor, (hidden, own, weight, states.table(layer), *extra, out))
        ahead = self.ahead if self.ahead is not None and self.ahead.takes(index) else None
        calls: list[Call] = []
        if self.files is not None:
            files = self.files
            calls.append(HostCall(STAGE, lambda: files.bring(layer, index)))
        if ahead is not None:
            calls += ahead.before(layer, index)
        calls.append(PackedCall(STAGE, self._assign, assign))
        if ahead is not None:
            calls += ahead.guess(layer, hidden, index)
        if self.helper is not None:
            calls += self.helper.post(layer, hidden, theirs, weight)
        calls.append(self._bring(states.state(layer)))
        if ahead is not None:
            calls += ahead.bring(layer)
        calls.append(PackedCall(STAGE, own_kernel or work.function, tuple(experts)))
        if self.helper is not None:
            calls += self.helper.collect(layer, out)
        if ahead is not None:
            calls += ahead.behind(layer)
        return calls
