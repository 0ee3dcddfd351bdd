"""Plans for experts that are all used alike, and policies for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.ids import LayerId
from moec.artifacts.layout.footprint import LayerFootprint
from moec.artifacts.schedule import LayerProfile, Policy, RoutingProfile
from moec.runtime.experts.residency import LayerPlan, plan_layers

if TYPE_CHECKING:
    from collections.abc import Sequence


LRU = Policy("lru", 0, 0, "always")
LFRU = Policy("lfru", 32, 0, "always")


def share(layer: LayerFootprint) -> tuple[float, ...]:
    """Every expert of ``layer`` alike."""
    return (layer.top_k / layer.experts,) * layer.experts


def uniform_plans(
    shapes: Sequence[tuple[int, int, int]], capacity_bytes: int, orders: Sequence[Sequence[int]] | None = None
) -> tuple[LayerPlan, ...]:
    """Plans of layers given as (experts, top-k, bytes of one expert) within ``capacity_bytes``."""
    layers = [
        LayerFootprint(LayerId(n), experts, top_k, size, size)
        for n, (experts, top_k, size) in enumerate(shapes)
    ]
    ranked = orders or [range(experts) for experts, _, _ in shapes]
    profile = RoutingProfile(
        "uniform",
        0,
        0,
        tuple(
            LayerProfile(layer.layer, tuple(order), share(layer), share(layer), ())
            for layer, order in zip(layers, ranked, strict=True)
        ),
    )
    return plan_layers(layers, profile, capacity_bytes)
