"""What a layer with a state instead of a cache computes, and how large that state is.

A state is float32, of one size however long the sequence, and belongs to one sequence: kernels find it by the row of
the page table that the sequence has. A token at position 0 begins with a state of zeros, whatever lies there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

Decay: TypeAlias = Literal["head", "channel", "rates", "fixed"]
Shape: TypeAlias = "tuple[int | Literal['T'], ...]"

STATE_PREFIX = "state_"
"""Before the name of a state: its kernel."""


@dataclass(frozen=True)
class ConvolutionSpec:
    """A causal convolution of each channel by itself.

    ::

        out[t, c] = bias[c] + sum_j weight[j, c] x[t - width + 1 + j, c]

    What is before position 0 is 0. The state is the last ``width - 1`` inputs, oldest first.
    """

    kind: Literal["convolution"]
    name: str
    channels: int
    width: int
    bias: bool


@dataclass(frozen=True)
class RecurrenceSpec:
    """A linear recurrence over a matrix ``S [key_dim, value_dim]`` for each of ``value_heads`` heads.

    For each token, with the head's query q, key k, value v and the elements d of its decay::

        S = exp(d) * S
        w = beta * (v - S^T k)   where delta, else v
        S = S + k w^T
        out = S^T q

    Consecutive value heads share a query and key head. ``decay`` says what d is: of ``head``, one number a token and
    head; of ``channel``, one a row of S; of ``rates``, ``steps * rates`` of a step for each column, which the token
    brings, and a rate for each element, which is a weight; ``fixed``, one weight a head.

    ``head`` with delta is the gated delta rule (arXiv 2412.06464), ``channel`` with delta Kimi's delta attention (arXiv
    2510.26692), ``head`` without it Mamba-2 (arXiv 2405.21060), ``rates`` Mamba (arXiv 2312.00752) with all channels as
    columns of one head, ``fixed`` lightning attention (arXiv 2401.04658).
    """

    kind: Literal["recurrence"]
    name: str
    key_heads: int
    """Query and key heads; divides ``value_heads``."""
    value_heads: int
    key_dim: int
    value_dim: int
    decay: Decay
    delta: bool


StateSpec: TypeAlias = ConvolutionSpec | RecurrenceSpec


def state_shape(spec: StateSpec) -> tuple[int, ...]:
    """One sequence's state, float32."""
    if isinstance(spec, ConvolutionSpec):
        return (spec.width - 1, spec.channels)
    return (spec.value_heads, spec.key_dim, spec.value_dim)


def state_bytes(spec: StateSpec) -> int:
    """Bytes of one sequence's state, a multiple of 64."""
    return -(-4 * math.prod(state_shape(spec)) // 64) * 64


def state_inputs(spec: StateSpec) -> tuple[Shape, ...]:
    """Shapes of what a step reads, all float32, in the order of the kernel's arguments.

    x ``[1, T, C]``; or query and key ``[1, T, Hk, Dk]``, value ``[1, T, Hv, Dv]``, what the token brings of the decay,
    and beta ``[1, T, Hv]`` where delta.
    """
    if isinstance(spec, ConvolutionSpec):
        return ((1, "T", spec.channels),)
    heads = spec.value_heads
    key: Shape = (1, "T", spec.key_heads, spec.key_dim)
    value: Shape = (1, "T", heads, spec.value_dim)
    decays: dict[Decay, tuple[Shape, ...]] = {
        "head": ((1, "T", heads),),
        "channel": ((1, "T", heads, spec.key_dim),),
        "rates": (value,),
        "fixed": (),
    }
    return (key, key, value, *decays[spec.decay], *(((1, "T", heads),) if spec.delta else ()))


def state_weights(spec: StateSpec) -> tuple[tuple[int, ...], ...]:
    """Shapes of the weights, all float32, in the order of the kernel's arguments.

    weight ``[width, C]`` and bias ``[C]`` where there is one; or of the decay: rates ``[Hv, Dk, Dv]``, or ``[Hv]``
    where it is fixed.
    """
    if isinstance(spec, ConvolutionSpec):
        return ((spec.width, spec.channels), *(((spec.channels,),) if spec.bias else ()))
    if spec.decay == "rates":
        return ((spec.value_heads, spec.key_dim, spec.value_dim),)
    return ((spec.value_heads,),) if spec.decay == "fixed" else ()


def state_output(spec: StateSpec) -> Shape:
    """Shape of the result, float32."""
    return state_inputs(spec)[0 if isinstance(spec, ConvolutionSpec) else 2]
