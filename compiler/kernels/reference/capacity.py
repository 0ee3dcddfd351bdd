"""Dropping tokens beyond an expert's capacity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moec.artifacts.model import ExpertsLayer
    from moec.compiler.kernels.reference.array import Array


def keep_within_capacity(
    layer: ExpertsLayer, index: NDArray[np.int64], weight: Array, calls: Sequence[int]
) -> Array:
    """Weights ``[T, K]`` with 0 for choices beyond an expert's capacity.

    Args:
        layer: says how many tokens of one call an expert takes.
        index: ``[T, K]``, the chosen experts.
        weight: ``[T, K]``.
        calls: of each token, the number in the step of the first token of its call.
    """
    kept = weight.copy()
    for call in sorted(set(calls)):
        rows = np.flatnonzero(np.array(calls) == call)
        most = layer.capacity or math.ceil(layer.capacity_share * len(rows))
        # First choices of all tokens, then second ones.
        places = [(token, choice) for choice in range(index.shape[1]) for token in rows]
        chosen = np.array([index[place] for place in places])
        for number, place in enumerate(places):
            if (chosen[: number + 1] == chosen[number]).sum() > most:
                kept[place] = 0.0
    return kept
