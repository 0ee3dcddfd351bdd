"""Which experts stay on which tier: the rules that the planner plans by and the runtime loads by.

Whatever the budget, a prefix of the same order is taken: so a larger budget keeps everything that a smaller one
keeps, and what falls with each expert (misses, milliseconds) falls with the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.layout.footprint import LayerFootprint


@dataclass(frozen=True)
class Hosted:
    """What a number of bytes of host memory holds."""

    counts: tuple[int, ...]
    """Experts of each MoE layer that stay; the most used ones at first."""
    transient_bytes: int
    """Set aside for experts that are read, used and dropped again. 0 where every layer keeps its top-k."""


def host_experts(
    layers: Sequence[LayerFootprint], use_shares: Sequence[Sequence[float]], room_bytes: int
) -> Hosted:
    """Divide ``room_bytes`` among the layers of a model that runs on the CPU alone.

    Args:
        layers: the MoE layers.
        use_shares: for each layer, use of its experts in the profile's order, never rising.
        room_bytes: for routed experts; at least those that one token chooses in any one layer.
    """
    order = host_order(use_shares)
    counts = take_prefix(order, layers, room_bytes)
    if all(count >= layer.top_k for count, layer in zip(counts, layers, strict=True)):
        return Hosted(tuple(counts), 0)
    transient = max(layer.top_k * layer.stride_bytes for layer in layers)
    return Hosted(tuple(take_prefix(order, layers, room_bytes - transient)), transient)


def device_slots(
    layers: Sequence[LayerFootprint], slot_values: Sequence[Sequence[float]], room_bytes: int
) -> tuple[int, ...]:
    """How many expert slots each layer gets from ``room_bytes`` on a GPU: those of the most value per byte first.

    Args:
        layers: the MoE layers.
        slot_values: for each layer, what its first, second, … slot is worth, never rising.
        room_bytes: for slots.
    """
    units = [
        (-value / layers[number].stride_bytes, slot, number)
        for number, values in enumerate(slot_values)
        for slot, value in enumerate(values)
    ]
    return tuple(take_prefix([number for _, _, number in sorted(units)], layers, room_bytes))


def host_order(use_shares: Sequence[Sequence[float]]) -> list[int]:
    """Layer numbers in the order in which they get an expert in host memory: the most used expert first.

    Args:
        use_shares: for each layer, use of its experts in the profile's order, never rising.
    """
    units = [
        (-share, rank, number)
        for number, shares in enumerate(use_shares)
        for rank, share in enumerate(shares)
    ]
    return [number for _, _, number in sorted(units)]


def take_prefix(order: Sequence[int], layers: Sequence[LayerFootprint], budget_bytes: int) -> list[int]:
    """How many experts each layer gets from ``order`` (layer numbers) before the budget is spent."""
    counts = [0] * len(layers)
    for layer in order:
        budget_bytes -= layers[layer].stride_bytes
        if budget_bytes < 0:
            break
        counts[layer] += 1
    return counts
