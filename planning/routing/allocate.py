"""What each slot of a layer is worth."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


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
