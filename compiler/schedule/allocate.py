"""Hand out bytes to experts, one at a time, in an order that no budget changes.

Whatever the budget, a prefix of the same order is taken: so a larger budget keeps everything that a smaller
one keeps, and what falls with each expert (misses, milliseconds) falls with the budget.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from moec.compiler.schedule.facts import LayerFacts


def take_prefix(order: Sequence[int], layers: Sequence[LayerFacts], budget_bytes: int) -> list[int]:
    """How many experts each layer gets from ``order`` (layer numbers) before the budget is spent."""
    counts = [0] * len(layers)
    for layer in order:
        budget_bytes -= layers[layer].stride_bytes
        if budget_bytes < 0:
            break
        counts[layer] += 1
    return counts


def slot_order(curves: Sequence[npt.NDArray[np.float64]], layers: Sequence[LayerFacts]) -> list[int]:
    """Layer numbers in the order in which they get a slot: the most milliseconds saved per byte first.

    Args:
        curves: for each layer, milliseconds with 0..E slots, ``[E + 1]``.
        layers: the layers.
    """
    units: list[tuple[float, int, int]] = []
    for number, (curve, facts) in enumerate(zip(curves, layers, strict=True)):
        rates = hull_rates(curve) / facts.stride_bytes
        units += [(-float(rate), slot, number) for slot, rate in enumerate(rates)]
    return [number for _, _, number in sorted(units)]


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


def hull_rates(curve: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What each step along ``curve`` saves on its lower convex hull, ``[E]``, never rising.

    A step that saves nothing by itself may be on the way to one that saves much; the hull spreads the saving.
    """
    corners = [0]
    for point in range(1, len(curve)):
        while len(corners) > 1 and _saving(curve, corners[-2], corners[-1]) <= _saving(
            curve, corners[-1], point
        ):
            corners.pop()
        corners.append(point)
    rates = np.zeros(len(curve) - 1)
    for left, right in itertools.pairwise(corners):
        rates[left:right] = _saving(curve, left, right)
    return np.minimum.accumulate(rates)


def _saving(curve: npt.NDArray[np.float64], left: int, right: int) -> float:
    return float(curve[left] - curve[right]) / (right - left)
