"""Steps of many tokens: experts streamed through buffers on the device, or run from the slots; which is faster.

Times are in milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.schedule import PrefillPlan
from moec.planning.cost import BYTES_PER_MS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.footprint import Footprint, LayerFootprint
    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.schedule import RoutingProfile

STREAM_BUFFERS = 2
"""One is filled while the other is read."""
KERNEL_SHARE_OF_COPIES = 0.92
"""What kernels that read host memory reach of what the copy engine reaches: 50.5 of 54.7 GB/s on an H100."""
PRODUCT_SHARE = 0.5
"""Of `MachineRecord.gpu_tflops` that products of many tokens are reckoned to reach."""


def prefill_plan(
    machine: MachineRecord,
    facts: Footprint,
    profile: RoutingProfile,
    slots: Sequence[int],
    step_tokens: int,
) -> PrefillPlan:
    """How prompts and large batches run on a GPU with ``slots`` expert slots in each layer."""
    complete = all(held >= layer.experts for layer, held in zip(facts.layers, slots, strict=True))
    streamed = step_tokens + 1
    for tokens in range(1, 1 if complete else step_tokens + 1):
        if _streamed(machine, facts, slots, tokens) <= _cached(machine, facts, profile, slots, tokens):
            streamed = tokens
            break
    return PrefillPlan(
        order=tuple(layer.layer for layer in facts.layers),
        buffers=STREAM_BUFFERS,
        buffer_bytes=facts.working_set_bytes,
        streamed_from_tokens=streamed,
        milliseconds_per_step=_streamed(machine, facts, slots, step_tokens),
    )


def _streamed(machine: MachineRecord, facts: Footprint, slots: Sequence[int], tokens: int) -> float:
    """Every layer's experts without a slot copied, behind the arithmetic of the layer before."""
    copies = machine.link_gb_s * min(1.0, machine.link_efficiency / KERNEL_SHARE_OF_COPIES)
    time = _dense(machine, facts, tokens)
    for layer, held in zip(facts.layers, slots, strict=True):
        link = (layer.experts - held) * layer.stride_bytes / BYTES_PER_MS / copies
        time += max(link, _products(machine, layer, tokens, layer.experts))
    return time


def _cached(
    machine: MachineRecord, facts: Footprint, profile: RoutingProfile, slots: Sequence[int], tokens: int
) -> float:
    """Every expert that some token chooses, those without a slot read through the link by kernels."""
    link = machine.link_gb_s * machine.link_efficiency
    time = _dense(machine, facts, tokens)
    for layer, each, held in zip(facts.layers, profile.layers, slots, strict=True):
        # Tokens that choose independently of each other; those that agree touch fewer experts.
        touched = 1 - (1 - np.minimum(1.0, np.array(each.use_share))) ** tokens
        missed = float(touched[held:].sum()) * layer.expert_bytes / BYTES_PER_MS / link
        time += max(missed, _products(machine, layer, tokens, float(touched.sum())))
    return time


def _products(machine: MachineRecord, layer: LayerFootprint, tokens: int, experts: float) -> float:
    """A layer's experts in the GPU's memory: read once, or as fast as they are multiplied."""
    reading = (
        experts * layer.expert_bytes / BYTES_PER_MS / (machine.gpu_bandwidth_gb_s * machine.gpu_efficiency)
    )
    return max(reading, _arithmetic(machine, tokens * layer.top_k * layer.expert_bytes))


def _dense(machine: MachineRecord, facts: Footprint, tokens: int) -> float:
    size = facts.dense_bytes_per_token
    reading = size / BYTES_PER_MS / (machine.gpu_bandwidth_gb_s * machine.gpu_efficiency)
    return max(reading, _arithmetic(machine, tokens * size))


def _arithmetic(machine: MachineRecord, weight_bytes: int) -> float:
    """A multiplication and an addition for each weight, 2 bytes each: as many operations as bytes."""
    return weight_bytes / (machine.gpu_tflops * PRODUCT_SHARE * 1e9) if machine.gpu_tflops else 0.0
