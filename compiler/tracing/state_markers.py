"""Where states are advanced: the markers of layers that keep a state instead of a cache.

T tokens of a step, C channels, Hk and Hv key and value heads, Dk and Dv head sizes. What they compute is
`moec.artifacts.states`'s to say.
"""

from __future__ import annotations

import torch

CONVOLUTION = "moec.convolution.default"
RECURRENCE = "moec.recurrence.default"
STATES = (CONVOLUTION, RECURRENCE)


@torch.library.custom_op("moec::convolution", mutates_args=())
def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A causal convolution of each channel. It has a shape and no meaning of its own.

    Args:
        x: ``[1, T, C]``.
        weight: ``[width, C]``.
        bias: ``[C]`` or ``None``.

    Returns:
        ``[1, T, C]``.
    """
    raise NotImplementedError("moec::convolution is a marker: it is replaced by a kernel")


@convolution.register_fake
def _convolution_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    del weight, bias
    return x.new_empty(x.shape)


@torch.library.custom_op("moec::recurrence", mutates_args=())
def recurrence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    rates: torch.Tensor | None,
    kind: str,
) -> torch.Tensor:
    """A linear recurrence over a matrix for each value head. It has a shape and no meaning of its own.

    Args:
        query: ``[1, T, Hk, Dk]``.
        key: ``[1, T, Hk, Dk]``.
        value: ``[1, T, Hv, Dv]``.
        decay: what the token brings of the decay: ``[1, T, Hv]``, ``[1, T, Hv, Dk]`` or the steps ``[1, T, Hv, Dv]``;
            ``None`` where it is fixed.
        beta: ``[1, T, Hv]`` where the delta rule applies, else ``None``.
        rates: the weight of a decay that has one, ``[Hv, Dk, Dv]`` or ``[Hv]``, else ``None``.
        kind: of decay, see `moec.artifacts.states.Decay`.

    Returns:
        ``[1, T, Hv, Dv]``.
    """
    raise NotImplementedError("moec::recurrence is a marker: it is replaced by a kernel")


@recurrence.register_fake
def _recurrence_shape(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    rates: torch.Tensor | None,
    kind: str,
) -> torch.Tensor:
    del query, key, decay, beta, rates, kind
    return value.new_empty(value.shape)
