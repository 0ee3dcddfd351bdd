"""The order in which experts get a slot on the device; see ``artifacts.hosting`` for host memory."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from moec.artifacts.footprint import LayerFootprint


def slot_order(curves: Sequence[npt.NDArray[np.float64]], layers: Sequence[LayerFootprint]) -> list[int]:
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
