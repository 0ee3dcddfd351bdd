"""Tensors that a bundle has in several forms of one parameter: one random parameter, turned as the packing says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from benchmarks.random_weights.values import RandomPool
    from moec.artifacts.packing import DenseTensor

VIEW = "aten.view.default"
MOVES: dict[str, Callable[..., Any]] = {
    VIEW: lambda x, shape: x.reshape(shape),
    "aten.slice.Tensor": lambda x, axis, begin, end: x[(slice(None),) * axis + (slice(begin, end),)],
    "aten.transpose.int": lambda x, first, second: x.swapaxes(first, second),
    "aten.clone.default": lambda x: x,
}
"""Operations of a recipe that move values and compute none."""


class DerivedTensors:
    """Values of the forms of a parameter, which is found anew for each at one place of the pool.

    Kernels for few tokens and for many may have a form each of one matrix (``kv_b_proj`` of latent attention): only
    where both come from one parameter do they compute the same.
    """

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def values(self, tensor: DenseTensor, pool: RandomPool, place: int) -> NDArray[Any] | None:
        """A tensor's values in the pool's element type; ``None`` where it is more, or less, than such a form.

        Args:
            tensor: of the bundle.
            pool: of its element type.
            place: where a parameter that is new begins.
        """
        if len(tensor.sources) != 1 or not tensor.steps or any(step.op not in MOVES for step in tensor.steps):
            return None
        shape = tensor.steps[0].arguments[1]
        if tensor.steps[0].op != VIEW or not isinstance(shape, tuple) or -1 in shape:
            return None
        begin = self._places.setdefault(tensor.sources[0], place)
        values = [pool.at(begin, math.prod(map(_whole, shape)))]
        for step in tensor.steps:
            arguments = (values[item["ref"]] if isinstance(item, dict) else item for item in step.arguments)
            values.append(MOVES[step.op](*arguments))
        return np.ascontiguousarray(values[-1])


def _whole(number: object) -> int:
    assert isinstance(number, int)
    return number
