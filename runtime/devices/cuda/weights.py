"""All weights of a bundle on the GPU: each file in one piece, tensors and experts by their offsets in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.paths import DENSE_NAME, experts_name
from moec.runtime.devices.cuda.memory import DeviceMemory
from moec.runtime.devices.cuda.upload import WeightFile, upload
from moec.runtime.devices.protocol import HostCall, PackedCall, View

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.ids import TensorName
    from moec.artifacts.reader import Bundle
    from moec.artifacts.verify import Level
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.protocol import Call
    from moec.runtime.routing import RoutingRecorder
    from moec.runtime.stats import Stats


class ResidentWeights:
    """The bundle's weight files in the GPU's memory.

    Args:
        device: the GPU.
        bundle: its weight files need not have been verified.
        verify: ``full``: hash what is copied.
        progress: told the bytes of each piece, from several threads.
        with_experts: routed experts too.

    Raises:
        BundleError: a file is damaged.
        BudgetError: they do not fit.
    """

    def __init__(
        self,
        device: CudaDevice,
        bundle: Bundle,
        verify: Level,
        progress: Callable[[int], None] | None,
        *,
        with_experts: bool = True,
    ) -> None:
        device.enter()
        names = weight_files(bundle) if with_experts else [DENSE_NAME]
        records = bundle.manifest.files
        self._memory = {name: DeviceMemory(device.resources, records[name].size_bytes) for name in names}
        files = [
            WeightFile(
                name,
                self._memory[name].address,
                records[name].size_bytes,
                records[name].sha256 if verify == "full" else None,
            )
            for name in names
        ]
        upload(device.resources, bundle.path, files, progress)
        self.dense_memory = self._memory[DENSE_NAME]
        dense = self.dense_memory.address
        self.dense: dict[TensorName, int] = {
            name: dense + place.offset_bytes for name, place in bundle.dense.items()
        }
        """Address of each dense tensor."""
        names = [experts_name(layer.layer) for layer in bundle.model.experts]
        self.experts = [self._memory[name].address for name in names if with_experts]
        """Address of the first expert of each MoE layer; none where they are elsewhere."""


class ResidentExperts:
    """Makes the calls of experts that are all on the GPU (see `moec.runtime.expert_calls.ExpertCalls`)."""

    runs_beside = True

    def __init__(self, device: CudaDevice, bundle: Bundle, weights: ResidentWeights) -> None:
        self.recorder: RoutingRecorder | None = None
        self.weights = weights
        """Kept with the calls: whoever holds addresses in it must hold it too."""
        self._device = device
        self._memory = []
        self._tables: list[Any] = []
        for layer, first in zip(bundle.model.experts, weights.experts, strict=True):
            stride = bundle.expert_layout(layer.layer).stride_bytes
            memory = device.hold(first + stride * np.arange(layer.experts, dtype=np.int64))
            self._memory.append(memory)
            self._tables.append(device.tensor(View(memory.address, "int64", (layer.experts,))))

    def count(self, stats: Stats) -> None:
        """Nothing is counted: every expert is there."""

    def calls(
        self, layer: int, function: Callable[..., Any], views: tuple[View, ...], workspace: tuple[View, ...]
    ) -> list[Call]:
        """The call of one layer; while routing is recorded the host reads it in between."""
        hidden, index, weight, *extra, out = map(self._device.tensor, (*views[:3], *workspace, views[3]))
        arguments = (hidden, index, weight, self._tables[layer], *extra, out)
        if self.recorder is None:
            return [PackedCall("experts", function, arguments)]

        def run() -> None:
            if self.recorder is not None:
                self.recorder.record(layer, self._device.read(views[1]), self._device.read(views[2]))
            function(*arguments)

        return [HostCall("experts", run)]


def weight_files(bundle: Bundle) -> list[str]:
    """The files with weights, relative to the bundle."""
    return [DENSE_NAME, *(experts_name(layer.layer) for layer in bundle.model.experts)]
