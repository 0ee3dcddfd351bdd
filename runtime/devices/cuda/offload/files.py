"""Experts that are only in the bundle's files: the host reads them into pinned places before their layer runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.paths import experts_name
from moec.runtime.devices.cuda.driver.memory import PinnedMemory
from moec.runtime.devices.cuda.offload.host_tier import opened, read_expert

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moec.artifacts.files.bundle import Bundle
    from moec.runtime.device import View
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.driver.functions import Handle
    from moec.runtime.devices.cuda.offload.host_tier import HostTier
    from moec.runtime.devices.cuda.offload.slots import DeviceSlots


class FileExperts:
    """Reads experts of the files into pinned places, and tells the GPU where they are.

    Args:
        device: the GPU.
        bundle: has the files.
        slots: who is on the GPU.
        tier: who is in host memory.
    """

    def __init__(self, device: CudaDevice, bundle: Bundle, slots: DeviceSlots, tier: HostTier) -> None:
        self._device, self._bundle, self._slots, self._tier = device, bundle, slots, tier
        self._stride = max(layer.stride_bytes for layer in slots.plan.layers)
        self._memory = PinnedMemory(device.resources, slots.plan.file_places * self._stride)
        self._names = [experts_name(layer.layer) for layer in bundle.model.experts]
        self._sent = [device.resources.event() for _ in range(slots.plan.file_places)]
        self._next = 0
        self.tables: Sequence[NDArray[np.int64]] = ()
        """The CPU's, of each layer ``[E]``: they are told too."""

    def bring(self, layer: int, index: View) -> None:
        """Read those of the chosen experts ``[T, K]`` that are nowhere else; waits for the router."""
        chosen = np.unique(self._device.read(index))
        own = self._slots.plan.layers[layer]
        known = chosen[(chosen >= 0) & (chosen < own.experts)]
        outside = known[self._tier.homes[layer][known] == 0]
        if not outside.size:
            return
        resident = self._slots.states.residents()[layer]
        for place, expert in enumerate(outside[resident[outside] < 0].tolist()):
            address = self._read(layer, expert, place)
            self._device.write(self._slots.states.home(layer, expert), np.array([address], np.int64))
            if self.tables:
                self.tables[layer][expert] = address

    def read_ahead(self, layer: int, expert: int) -> int:
        """Read an expert for a copy that is put into a stream next, and then told to `sent`; its address."""
        self._device.driver.wait(self._sent[self._next])
        return self._read(layer, expert, self._next)

    def sent(self, stream: Handle) -> None:
        """The copy of what `read_ahead` read is in ``stream``."""
        self._device.driver.record(self._sent[self._next], stream)
        self._next = (self._next + 1) % len(self._sent)

    def _read(self, layer: int, expert: int, place: int) -> int:
        """Read an expert into a place, which nothing may use any more; its address.

        Raises:
            BundleError: the file is shorter than it was, or cannot be read.
        """
        own, name = self._slots.plan.layers[layer], self._names[layer]
        target: NDArray[np.uint8] = self._memory.bytes[place * self._stride :][: own.stride_bytes]
        with opened(self._bundle, name) as file:
            read_expert(file, target, expert * own.stride_bytes, self._bundle, name)
        return int(target.ctypes.data)
