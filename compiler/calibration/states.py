"""Layers that keep a state, in torch, over one whole sequence: the formulas of `moec.artifacts.states`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moec.artifacts.states import ConvolutionSpec, state_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.states import RecurrenceSpec, StateSpec


def advance_all(
    spec: StateSpec, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """What the tokens of a sequence get.

    Args:
        spec: which state.
        inputs: ``[T, ...]``, as `moec.artifacts.states.state_inputs` has them, without the axis of the batch.
        weights: as the kernel takes them.
    """
    if isinstance(spec, ConvolutionSpec):
        return _convolve(spec, inputs[0], weights)
    return _recur(spec, inputs, weights)


def _convolve(spec: ConvolutionSpec, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    padded = torch.cat([x.new_zeros(spec.width - 1, spec.channels), x])
    parts = [weights[0][tap] * padded[tap : tap + len(x)] for tap in range(spec.width)]
    out = torch.stack(parts).sum(0)
    return out + weights[1] if spec.bias else out


def _recur(
    spec: RecurrenceSpec, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    group = spec.value_heads // spec.key_heads
    queries, keys = (each.repeat_interleave(group, 1) for each in inputs[:2])
    values, rest = inputs[2], list(inputs[3:])
    betas = rest.pop() if spec.delta else None
    state = queries.new_zeros(state_shape(spec))
    results = []
    for token in range(len(queries)):
        decay = _decay(spec, [each[token] for each in rest], weights)
        key, value = keys[token], values[token]
        state = torch.exp(decay) * state
        if betas is not None:
            value = betas[token][:, None] * (value - torch.einsum("hkv,hk->hv", state, key))
        state = state + key[:, :, None] * value[:, None, :]
        results.append(torch.einsum("hkv,hk->hv", state, queries[token]))
    return torch.stack(results)


def _decay(
    spec: RecurrenceSpec, brought: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    if spec.decay == "head":
        return brought[0][:, None, None]
    if spec.decay == "channel":
        return brought[0][:, :, None]
    if spec.decay == "rates":
        return brought[0][:, None, :] * weights[0]
    return weights[0][:, None, None]
