"""What rounding to integers leaves of activations, in numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


LEAST_UNIT = 2.0**-100


def rounded(x: NDArray[Any], group: int, bits: int = 16) -> NDArray[np.float64]:
    """``x [.., K]``: each group of columns in units of a power of two, so that its largest takes all ``bits``.

    The unit is ``LEAST_UNIT`` at least.
    """
    columns = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-columns // group) * group))
    padded[..., :columns] = x
    groups = padded.reshape(*x.shape[:-1], -1, group)
    _, exponent = np.frexp(np.abs(groups).max(-1, keepdims=True))
    unit = np.maximum(np.ldexp(1.0, exponent - (bits - 1)), LEAST_UNIT)
    values = np.minimum(np.rint(groups / unit), 2.0 ** (bits - 1) - 1) * unit
    result: NDArray[np.float64] = values.reshape(padded.shape)[..., :columns]
    return result
