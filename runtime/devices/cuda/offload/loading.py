"""Everything that offloaded experts need, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.program import cached_beside_name
from moec.artifacts.words.ahead import GUESS
from moec.artifacts.words.slots import ASSIGN, CACHED, FETCH
from moec.errors import BundleError
from moec.runtime.devices.cuda.offload.ahead import ExpertsAhead
from moec.runtime.devices.cuda.offload.calls import OffloadedExperts
from moec.runtime.devices.cuda.offload.files import FileExperts
from moec.runtime.devices.cuda.offload.host_tier import HostTier
from moec.runtime.devices.cuda.offload.slots import DeviceSlots
from moec.runtime.devices.cuda.offload.stream import LayerStream

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from moec.artifacts.files.bundle import Bundle
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.modules.module import CudaFunctions
    from moec.runtime.devices.cuda.uploading.weights import ResidentWeights
    from moec.runtime.experts.ahead import AheadPlan
    from moec.runtime.experts.slots import SlotPlan


def offloaded_experts(
    device: CudaDevice,
    bundle: Bundle,
    functions: CudaFunctions,
    target: str,
    plan: SlotPlan,
    ahead: AheadPlan | None,
    weights: ResidentWeights,
    hashed: Collection[str],
    progress: Callable[[int], None] | None,
) -> OffloadedExperts:
    """Bring experts to host memory and to the GPU by ``plan``, for the functions of ``target``.

    ``ahead`` says what is brought before a router has spoken, ``None``: nothing.

    Raises:
        BundleError: a file is damaged, or the bundle was compiled before experts could be offloaded.
        BudgetError: the GPU or the host has too little memory.
    """
    if not functions.has(ASSIGN):
        raise BundleError(
            "The bundle's CUDA module cannot run with experts off the GPU.",
            f"It has no function {ASSIGN}: it was compiled by an older moec.",
            "Compile the model again, or raise device_memory until all experts fit.",
        )
    if ahead is not None and not functions.has(GUESS):
        if ahead.asked:
            raise BundleError(
                "The bundle's CUDA module cannot bring experts ahead.",
                f"It has no function {GUESS}: it was compiled by an older moec.",
                "Compile the model again, or load it with prefetch=False.",
            )
        ahead = None
    tier = HostTier(device.resources, bundle, plan, hashed, progress)
    slots = DeviceSlots(device, bundle, plan, tier)
    files = FileExperts(device, bundle, slots, tier) if plan.file_places else None
    stream = LayerStream(device, bundle.model, slots, tier, files)
    names = [f"{CACHED}{layer.body}" for layer in bundle.model.experts]
    cached = [functions.get(name) if functions.has(name) else None for name in names]
    together = {each: cached_beside_name(each) for each in bundle.programs[target].beside}
    beside = {each: functions.get(name) for each, name in together.items() if functions.has(name)}
    kernels = functions.get(ASSIGN), functions.get(FETCH), cached, beside
    guesses = (
        None if ahead is None else ExpertsAhead(device, bundle, functions, ahead, slots.states, tier, weights)
    )
    return OffloadedExperts(device, slots, *kernels, stream, files, tier, weights, guesses)
