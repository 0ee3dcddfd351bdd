"""Which positions a token attends to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.artifacts.model import SelectionSpec
    from moec.compiler.kernels.reference.array import Array


def select(spec: SelectionSpec, query: Array, weight: Array, keys: Array, position: int) -> NDArray[np.bool_]:
    """Which positions a token may attend to.

    Args:
        spec: how positions are scored, and how many are selected.
        query: ``[H, D]``.
        weight: ``[H]``.
        keys: ``[positions, D]``, from position 0.
        position: the token's.

    Returns:
        ``[position + 1]``.
    """
    scores = weight @ np.maximum(spec.scaling * (query @ keys[: position + 1].T), 0.0)
    best = np.argsort(-scores, kind="stable")[: spec.top_k]
    return np.isin(np.arange(position + 1), best)
