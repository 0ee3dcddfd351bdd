"""The slots and the stage in the GPU's memory, filled with the experts that are used most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.runtime.devices.cuda.driver.memory import DeviceMemory
from moec.runtime.devices.cuda.offload.states import LayerStates, Places

if TYPE_CHECKING:
    from moec.artifacts.files.bundle import Bundle
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.offload.host_tier import HostTier
    from moec.runtime.experts.slots import SlotPlan


class DeviceSlots:
    """Memory for experts on the GPU, and the states that say who is where.

    Args:
        device: the GPU.
        bundle: has the experts that are not in host memory.
        plan: how many slots each layer has.
        tier: the experts in host memory.

    Raises:
        BudgetError: they do not fit.
    """

    def __init__(self, device: CudaDevice, bundle: Bundle, plan: SlotPlan, tier: HostTier) -> None:
        device.enter()
        self.plan = plan
        self._memory = [
            DeviceMemory(device.resources, layer.slots * layer.stride_bytes) if layer.slots else None
            for layer in plan.layers
        ]
        self._stage = DeviceMemory(device.resources, plan.stage_bytes) if plan.stage_bytes else None
        places = [
            Places(
                0 if memory is None else memory.address,
                self.stage_address,
                plan.stage_places(number),
                tier.homes[number],
            )
            for number, memory in enumerate(self._memory)
        ]
        self.slot_addresses = [place.slots for place in places]
        """Of each layer's first slot, 0 where it has none."""
        self.states = LayerStates(device, plan, places)
        self._fill(device, bundle, tier)
        device.unfinished.repair_with(lambda: self._restart(device, bundle, tier))

    @property
    def stage_address(self) -> int:
        """0 where there is no stage."""
        return 0 if self._stage is None else self._stage.address

    def _restart(self, device: CudaDevice, bundle: Bundle, tier: HostTier) -> None:
        """After a step that ended in its middle, and may have given slots to experts that were never fetched."""
        self.states.restart()
        self._fill(device, bundle, tier)

    def _fill(self, device: CudaDevice, bundle: Bundle, tier: HostTier) -> None:
        for number, layer in enumerate(self.plan.layers):
            for slot, expert in enumerate(layer.order[: layer.slots]):
                target = self.slot_addresses[number] + slot * layer.stride_bytes
                home = int(tier.homes[number][expert])
                if home:
                    device.copy_in(target, home, layer.stride_bytes)
                else:
                    device.write(target, bundle.expert_view(bundle.model.experts[number].layer, expert))
        device.synchronize()
