"""Routed experts, one token and one choice at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.compiler.kernels.reference.activation import activate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from moec.artifacts.model import ExpertBody
    from moec.compiler.kernels.reference.array import Array


def experts(
    body: ExpertBody,
    parts: Sequence[Mapping[str, Array]],
    x: Array,
    index: NDArray[np.int64],
    weight: Array,
    between: Callable[[Array], Array] = lambda middle: middle,
) -> Array:
    """``out [T, H]`` of ``x [T, H]``, ``index [T, K]``, ``weight [T, K]``; ``parts`` by expert and part name.

    ``between`` gives what the last product takes of an activation's result.
    """
    out = np.zeros_like(x)
    for token, row in enumerate(x):
        for expert, factor in zip(index[token], weight[token], strict=True):
            if 0 <= expert < len(parts):
                out[token] += factor * _expert(body, parts[expert], row, between)
    return out


def _expert(
    body: ExpertBody, parts: Mapping[str, Array], x: Array, between: Callable[[Array], Array]
) -> Array:
    names = ("gate", "up") if body.gated else ("up",)
    variables = {name: parts[name] @ x + parts.get(f"{name}_bias", 0.0) for name in names}
    middle = between(activate(body.activation, variables))
    product: Array = parts["down"] @ middle + parts.get("down_bias", 0.0)
    return product
