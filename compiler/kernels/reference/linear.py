"""Products with a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from moec.compiler.kernels.reference.array import Array


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """``x [.., T, K]``, ``weight [.., N, K]``, ``bias [.., N]`` to ``[.., T, N]``."""
    product = x @ np.swapaxes(weight, -1, -2)
    return product if bias is None else product + bias[..., None, :]
