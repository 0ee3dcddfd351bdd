"""The CPU computes a share of the missing experts, as large as the speeds of link and CPU make it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.sharing import MAILBOX_US, ShareSpeeds, cpu_shares, worth_uses
from moec.artifacts.words.slots import MOST_SHARED
from moec.planning.policies import worth_margin
from moec.runtime.devices.cuda.device import BOUNCE_BYTES
from moec.runtime.devices.cuda.measure import copy_rate
from moec.runtime.devices.cuda.rehearsal import GpuRehearsal
from moec.runtime.devices.cuda.sharing import CpuShare
from moec.runtime.tensors import aligned_empty

if TYPE_CHECKING:
    from moec.artifacts.files.bundle import Bundle
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.modules.module import CudaFunctions
    from moec.runtime.devices.cuda.offload.calls import OffloadedExperts
    from moec.runtime.sharing.loading import CpuSide


def let_cpu_help(
    device: CudaDevice,
    bundle: Bundle,
    functions: CudaFunctions,
    experts: OffloadedExperts,
    side: CpuSide,
    threads: int,
    link_efficiency: float,
) -> bool:
    """Start the CPU's threads, and give them their share of each layer's misses; whether any pays.

    Both speeds are measured here, with the threads and the memory that there are. What of the link's speed missing
    experts come at is ``link_efficiency``.

    Raises:
        BudgetError: there is no memory for it.
        DeviceError: a thread did not start.
    """
    assert side.serve is not None
    tables = []
    for homes in experts.tier.homes:
        table = aligned_empty(homes.shape, np.int64)
        table[:] = homes
        tables.append(table)
    addresses = [table.ctypes.data for table in tables]
    share = CpuShare(device, functions, side.serve, bundle.model, addresses, threads, keep=tables)
    plan = experts.slots.plan
    known = [np.flatnonzero(homes).tolist() for homes in experts.tier.homes]
    cpu_us = share.experts_us = GpuRehearsal(device, share, bundle.model, known).microseconds()
    dense = experts.weights.dense_memory
    link = link_rate(device, dense.address, dense.size_bytes)
    pays = False
    for number, layer in enumerate(plan.layers):
        shares: tuple[int, ...] = (0,) * (MOST_SHARED + 1)
        worth = -1
        if len(cpu_us) > 1:
            link_us = layer.stride_bytes / link / link_efficiency / 1e3
            speeds = ShareSpeeds(link_us, cpu_us, MAILBOX_US)
            shares, worth = cpu_shares(speeds, MOST_SHARED), worth_margin(plan.policy, worth_uses(speeds))
        experts.slots.states.set_shares(number, shares, worth)
        pays = pays or any(shares)
    if not pays:
        share.close()
        return False
    if experts.files is not None:
        experts.files.tables = tables
    experts.helper = share
    return True


def link_rate(device: CudaDevice, address: int, size_bytes: int) -> float:
    """GB/s of copies from the GPU's memory at ``address`` to the host; the way back is as fast."""
    size, copy = min(size_bytes, BOUNCE_BYTES), device.driver.copy_out
    device.enter()
    return copy_rate(
        device.resources,
        device.stream,
        size,
        lambda: copy(device.bounce_address, address, size, device.stream),
    )
