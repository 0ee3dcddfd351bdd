"""States, one token at a time.

Straight from the formulas of `moec.artifacts.states`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.states import ConvolutionSpec, state_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.states import RecurrenceSpec, StateSpec
    from moec.compiler.kernels.reference.array import Array


def advance(
    spec: StateSpec, state: Array, position: int, inputs: Sequence[Array], weights: Sequence[Array]
) -> tuple[Array, Array]:
    """One token of one sequence.

    Args:
        spec: which state.
        state: before the token, as `moec.artifacts.states.state_shape` says; at position 0 it does not matter.
        position: of the token.
        inputs: of this token, without the axes of the batch and of tokens.
        weights: as the kernel takes them.

    Returns:
        The state after it, and the result.
    """
    before = np.zeros(state_shape(spec)) if position == 0 else state
    if isinstance(spec, ConvolutionSpec):
        return _convolve(spec, before, inputs[0], weights)
    return _recur(spec, before, inputs, weights)


def _convolve(spec: ConvolutionSpec, state: Array, x: Array, weights: Sequence[Array]) -> tuple[Array, Array]:
    window = np.concatenate([state, x[None]])
    out = (window * weights[0]).sum(0) + (weights[1] if spec.bias else 0.0)
    return window[1:], out


def _recur(
    spec: RecurrenceSpec, state: Array, inputs: Sequence[Array], weights: Sequence[Array]
) -> tuple[Array, Array]:
    group = spec.value_heads // spec.key_heads
    query, key = (np.repeat(each, group, 0) for each in inputs[:2])
    value, rest = inputs[2], list(inputs[3:])
    beta = rest.pop() if spec.delta else None
    if spec.decay == "head":
        decay = rest[0][:, None, None]
    elif spec.decay == "channel":
        decay = rest[0][:, :, None]
    elif spec.decay == "rates":
        decay = rest[0][:, None, :] * weights[0]
    else:
        decay = weights[0][:, None, None]
    state = np.exp(decay) * state
    if beta is not None:
        value = beta[:, None] * (value - np.einsum("hkv,hk->hv", state, key))
    state = state + key[:, :, None] * value[:, None, :]
    return state, np.einsum("hkv,hk->hv", state, query)
