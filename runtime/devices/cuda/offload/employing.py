"""What the CPU's threads do beside a GPU: compute a share of the missing experts, feed the copy engine, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.words.orders import ORDER
from moec.errors import BundleError, DeviceError
from moec.runtime.devices.cuda.measure import FED_LEAST_BYTES, FED_LINK_EFFICIENCY, LINK_EFFICIENCY
from moec.runtime.devices.cuda.offload.feeding import CopyFeeder
from moec.runtime.devices.cuda.offload.helping import let_cpu_help, let_cpu_help_streams, link_rate

if TYPE_CHECKING:
    from moec.artifacts.files.bundle import Bundle
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.modules.module import CudaFunctions
    from moec.runtime.devices.cuda.offload.calls import OffloadedExperts
    from moec.runtime.sharing.loading import CpuSide

FED = "A CPU thread feeds the GPU's copy engine with missing experts."
IDLE = "The CPU computes no missing expert: over the link they are there sooner."
STREAMS_ALONE = (
    "The CPU computes missing experts of prompts; of a few tokens they are there sooner over the link."
)


def employ_cpu(
    device: CudaDevice,
    bundle: Bundle,
    functions: CudaFunctions,
    experts: OffloadedExperts,
    side: CpuSide,
    threads: int,
    copy_thread: bool | None,
    step_tokens: int,
) -> tuple[str, ...]:
    """Start the CPU's threads; what the user should know of it.

    Where nobody says it, a thread feeds the copy engine if there are threads, none has anything to compute, and experts
    are large enough for it to gain.

    Args:
        device: the GPU.
        bundle: the model.
        functions: of the GPU's module.
        experts: those that are off the GPU.
        side: the functions of the CPU's module.
        threads: that may compute experts.
        copy_thread: whether one more feeds the copy engine; ``None``: nobody says it.
        step_tokens: of the largest step.

    Raises:
        BudgetError: there is no memory for it.
        BundleError: the copy engine is to be fed, and the GPU's module has no function for it.
        DeviceError: a thread did not start.
    """
    if copy_thread and not functions.has(ORDER):
        raise BundleError(
            "The bundle's CUDA module cannot have its copy engine fed.",
            f"It has no function {ORDER}: it was compiled by an older moec.",
            "Compile the model again, or load it with copy_thread=False.",
        )
    notes, computes = [side.note], False
    if side.serve is not None:
        parts = device, bundle, functions, experts, side
        link = link_rate(device, experts.weights.dense_memory)
        efficiency = FED_LINK_EFFICIENCY if copy_thread else LINK_EFFICIENCY
        computes = let_cpu_help(*parts, threads, link * efficiency)
        streams = let_cpu_help_streams(*parts, link, step_tokens)
        if not computes:
            notes = [STREAMS_ALONE if streams else IDLE]
    slots = experts.slots
    most = max(layer.stride_bytes for layer in slots.plan.layers)
    feeds = copy_thread or (side.serve is not None and not computes and most >= FED_LEAST_BYTES)
    if feeds and side.feed is not None and functions.has(ORDER):
        try:
            experts.be_fed_by(CopyFeeder(device, slots.states, functions, side.feed, most))
        except DeviceError:
            if copy_thread:
                raise
        else:
            notes.append(FED)
    return tuple(notes)
