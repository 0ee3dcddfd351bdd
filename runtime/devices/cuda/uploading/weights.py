"""All weights of a bundle or a section of one on the GPU: tensors and experts by their places in the files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.dense_runs import dense_runs
from moec.artifacts.paths import DENSE_NAME, experts_name
from moec.runtime.device import PackedCall, View
from moec.runtime.devices.cuda.driver.memory import DeviceMemory
from moec.runtime.devices.cuda.uploading.upload import Upload, WeightFile

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.ids import TensorName
    from moec.artifacts.program import Beside
    from moec.artifacts.sections import Section
    from moec.runtime.device import Call
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.experts.calls import ExpertWork
    from moec.runtime.stats import Stats


class ResidentWeights:
    """Weights in the GPU's memory, as soon as ``upload`` is finished.

    Args:
        device: the GPU.
        section: whose weights; the files need not have been verified.
        hashed: those that are hashed while they are read. Of a section only the files of its experts are.
        progress: told the bytes of each piece, from several threads.
        with_experts: routed experts too.

    Raises:
        BudgetError: they do not fit.
    """

    def __init__(
        self,
        device: CudaDevice,
        section: Section,
        hashed: Collection[str],
        progress: Callable[[int], None] | None,
        *,
        with_experts: bool = True,
    ) -> None:
        device.enter()
        bundle, runs = section.bundle, dense_runs(section)
        layers = bundle.model.experts if with_experts else ()
        names = [experts_name(layer.layer) for layer in layers]
        records = bundle.manifest.files
        self.dense_memory = DeviceMemory(device.resources, runs.size_bytes)
        dense = self.dense_memory.address
        sha256 = records[DENSE_NAME].sha256 if section.whole and DENSE_NAME in hashed else None
        files = [
            WeightFile(DENSE_NAME, dense + run.offset, run.end - run.start, sha256, run.start)
            for run in runs.runs
        ]
        self._memory = {name: DeviceMemory(device.resources, records[name].size_bytes) for name in names}
        files += [
            WeightFile(
                name,
                memory.address,
                records[name].size_bytes,
                records[name].sha256 if name in hashed else None,
            )
            for name, memory in self._memory.items()
        ]
        self.dense: dict[TensorName, int] = {name: dense + place for name, place in runs.offsets.items()}
        """Address of each dense tensor."""
        self.experts = [self._memory[experts_name(layer.layer)].address for layer in layers]
        """Address of the first expert of each MoE layer; none where they are elsewhere."""
        self.upload = Upload(device.resources, bundle.path, files, progress)
        """Under way; `finish` or `abandon` must come."""


class ResidentExperts:
    """Makes the calls of experts that are all on the GPU (see `moec.runtime.experts.calls.ExpertCalls`)."""

    def __init__(self, device: CudaDevice, bundle: Bundle, weights: ResidentWeights) -> None:
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

    def runs_beside(self, beside: Beside) -> bool:
        """Always."""
        del beside
        return True

    def calls(self, work: ExpertWork) -> list[Call]:
        """The call of one layer."""
        hidden, index, weight, out = map(self._device.tensor, work.views)
        extra = map(self._device.tensor, work.workspace)
        arguments = (hidden, index, weight, self._tables[work.layer], *extra, out)
        return [PackedCall("experts", work.function, arguments)]
