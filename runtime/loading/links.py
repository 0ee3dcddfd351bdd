"""The ways between the GPUs of a divided model, and what its user is told of them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from moec.runtime.chain.executor import TOKEN_BYTES, Links
from moec.runtime.devices.cuda.link import link_between, reaches
from moec.runtime.memory.divided import carried_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.sections import Section
    from moec.runtime.chain.section import ChainSection
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.memory.device_budget import DevicePlan


def make_links(
    running: Sequence[ChainSection],
    devices: Sequence[CudaDevice],
    sections: Sequence[Section],
    plans: Sequence[DevicePlan],
    max_batch: int,
) -> Links:
    """The ways from each GPU to the next, and from the last one to those that read tokens.

    Raises:
        BudgetError: there is no pinned memory for them.
    """
    onward = tuple(
        link_between(source, target, carried_bytes(section, plan.needs.step_tokens))
        for (source, target), section, plan in zip(pairwise(devices), sections, plans, strict=False)
    )
    back = tuple(
        (section, link_between(devices[-1], device, TOKEN_BYTES * max_batch))
        for section, device in zip(running[:-1], devices, strict=False)
        if section.reads_tokens
    )
    return Links(onward, back)


def describe_division(devices: Sequence[CudaDevice], sections: Sequence[Section]) -> tuple[str, ...]:
    """For the user: who has which layers, and how they are connected."""
    parts = [
        f"cuda:{device.ordinal} runs "
        + (f"layers {layers.start} to {layers.stop - 1}" if layers else "what comes before the first layer")
        for device, layers in zip(devices, (section.layers for section in sections), strict=True)
    ]
    straight = all(reaches(*pair) for pair in pairwise(devices))
    way = (
        "straight from one to the next"
        if straight
        else "through host memory: these GPUs do not reach each other"
    )
    return (f"{', '.join(parts)}; hidden states go {way}.",)
