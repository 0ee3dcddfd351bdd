"""The CPU computes a share of the missing experts, as large as the speeds of link and CPU make it.

In steps of few tokens through the mailbox, in those of many as they stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.sharing import MAILBOX_US, ShareSpeeds, cpu_shares, worth_uses
from moec.artifacts.words.slots import MOST_SHARED
from moec.planning.policies import worth_margin
from moec.runtime.devices.cuda import sharing
from moec.runtime.devices.cuda.device import BOUNCE_BYTES
from moec.runtime.devices.cuda.measure import copy_rate
from moec.runtime.devices.cuda.offload import stream_share
from moec.runtime.devices.cuda.offload.stream_share import StreamShare
from moec.runtime.devices.cuda.rehearsal import GpuRehearsal
from moec.runtime.devices.cuda.sharing import CpuShare
from moec.runtime.tensors import aligned_empty

if TYPE_CHECKING:
    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.model import ModelRecord
    from moec.runtime.device import Memory
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
    link_gb_s: float,
) -> bool:
    """Start the CPU's threads, and give them their share of each layer's misses; whether any pays.

    Their speed is measured here, with the threads and the memory that there are. Missing experts come at ``link_gb_s``.

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
    pays = False
    for number, layer in enumerate(plan.layers):
        shares: tuple[int, ...] = (0,) * (MOST_SHARED + 1)
        worth = -1
        if len(cpu_us) > 1:
            link_us = layer.stride_bytes / link_gb_s / 1e3
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


def let_cpu_help_streams(
    device: CudaDevice,
    bundle: Bundle,
    functions: CudaFunctions,
    experts: OffloadedExperts,
    side: CpuSide,
    link_gb_s: float,
    step_tokens: int,
) -> bool:
    """Give the CPU its share of steps of many tokens, whose copies run at ``link_gb_s``; whether any pays.

    Raises:
        BudgetError: there is no memory for it.
    """
    plan = experts.slots.plan
    parts = device, functions, side.experts, bundle.model, experts.tier, experts.slots
    share = StreamShare(*parts, link_gb_s, step_tokens)
    experts.share_streams(share)
    # With more tokens the CPU has less to win.
    return any(share.takes(number, plan.streamed_tokens(number)) for number in range(len(plan.layers)))


def device_bytes(model: ModelRecord, step_tokens: int) -> int:
    """Of the GPU's memory that all this takes."""
    return sharing.device_bytes(model) + stream_share.device_bytes(model, step_tokens)


def host_bytes(model: ModelRecord, step_tokens: int) -> int:
    """Of host memory, pinned or not, that all this takes."""
    return sharing.host_bytes(model) + stream_share.host_bytes(model, step_tokens)


def link_rate(device: CudaDevice, memory: Memory) -> float:
    """GB/s of copies from some memory of the GPU to the host; the way back is as fast."""
    address, size, copy = memory.address, min(memory.size_bytes, BOUNCE_BYTES), device.driver.copy_out
    device.enter()
    return copy_rate(
        device.resources,
        device.stream,
        size,
        lambda: copy(device.bounce_address, address, size, device.stream),
    )
