"""What the kernels compute, in plain numpy and float64: the definition that tests hold every target to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from moec.artifacts.activation import Expression
    from moec.artifacts.model import AttentionSpec, ExpertBody, ExpertsLayer, SelectionSpec

Array = NDArray[np.float64]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


OPERATORS: dict[str, Callable[..., Any]] = {
    "neg": np.negative,
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "erf": _erf,
    "sqrt": np.sqrt,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.minimum,
    "max": np.maximum,
    "pow": np.power,
}
"""Every operator of ``artifacts.activation.ARITY``."""


def activate(expression: Expression, variables: Mapping[str, Array]) -> Array:
    """Evaluate an activation expression on ``gate`` and ``up``."""
    if isinstance(expression, str):
        return variables[expression]
    if isinstance(expression, (int, float)):
        return np.asarray(float(expression))
    operator, *operands = expression
    result: Array = OPERATORS[str(operator)](*(activate(operand, variables) for operand in operands))
    return result


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """``x [.., T, K]``, ``weight [.., N, K]``, ``bias [.., N]`` to ``[.., T, N]``."""
    product = x @ np.swapaxes(weight, -1, -2)
    return product if bias is None else product + bias[..., None, :]


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


def attention(
    spec: AttentionSpec,
    query: Array,
    keys: Array,
    values: Array,
    position: int,
    sinks: Array | None,
    bias: Array | None = None,
    selected: NDArray[np.bool_] | None = None,
) -> Array:
    """One token's attention.

    Args:
        spec: which positions it sees, and how scores are made.
        query: ``[Hq, Dk]``.
        keys: ``[positions, Hkv, Dk]``, from position 0; all of them are seen where the spec is not causal.
        values: ``[positions, Hkv, Dv]``; ignored where the spec is latent.
        position: the token's.
        sinks: ``[Hq]`` or ``None``.
        bias: ``[Hq, 2 * bias_reach + 1]`` or ``None``.
        selected: ``[position + 1]``, where only some of them are seen.

    Returns:
        ``[Hq, Dv]``.
    """
    first = max(0, position - spec.window + 1) if spec.window else 0
    if spec.chunk:
        first = max(first, position // spec.chunk * spec.chunk)
    end = position + 1 if spec.causal else len(keys)
    distances = np.clip(np.arange(first, end) - position, -spec.bias_reach, spec.bias_reach)
    group = spec.query_heads // spec.kv_heads
    heads = []
    for head in range(spec.query_heads):
        key = keys[first:end, head // group]
        value = key[:, : spec.value_dim] if spec.latent else values[first:end, head // group]
        scores = spec.scaling * (key @ query[head])
        if spec.softcap:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        if bias is not None:
            scores = scores + bias[head, distances + spec.bias_reach]
        if selected is not None:
            scores = np.where(selected[first:], scores, -np.inf)
        largest = scores.max() if sinks is None else max(scores.max(), sinks[head])
        weights = np.exp(scores - largest)
        total = weights.sum() + (0.0 if sinks is None else np.exp(sinks[head] - largest))
        heads.append(weights @ value / total)
    return np.stack(heads)


def expand_latents(
    spec: AttentionSpec, latents: Array, key_weight: Array, value_weight: Array
) -> tuple[AttentionSpec, Array, Array]:
    """What cached latents stand for.

    Args:
        spec: with ``heads``.
        latents: ``[positions, 1, key_dim]`` as they are cached: latent, then the part of the key that heads share.
        key_weight: A ``[Hq, nope_dim, rank]``.
        value_weight: B ``[Hq, value_dim, rank]``.

    Returns:
        The attention of the heads by themselves, their keys ``[positions, Hq, query_dim]`` and values ``[positions,
        Hq, result_dim]``.
    """
    latent, shared = latents[:, 0, : spec.value_dim], latents[:, 0, spec.value_dim :]
    own = np.einsum("pr,hnr->phn", latent, key_weight)
    spread = np.broadcast_to(shared[:, None], (len(latents), spec.query_heads, shared.shape[-1]))
    return spec.expanded, np.concatenate([own, spread], -1), np.einsum("pr,hvr->phv", latent, value_weight)


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


def experts(
    body: ExpertBody,
    parts: Sequence[Mapping[str, Array]],
    x: Array,
    index: NDArray[np.int64],
    weight: Array,
) -> Array:
    """``out [T, H]`` of ``x [T, H]``, ``index [T, K]``, ``weight [T, K]``; ``parts`` by expert and part name."""
    out = np.zeros_like(x)
    for token, row in enumerate(x):
        for expert, factor in zip(index[token], weight[token], strict=True):
            if 0 <= expert < len(parts):
                out[token] += factor * _expert(body, parts[expert], row)
    return out


def _expert(body: ExpertBody, parts: Mapping[str, Array], x: Array) -> Array:
    names = ("gate", "up") if body.gated else ("up",)
    variables = {name: parts[name] @ x + parts.get(f"{name}_bias", 0.0) for name in names}
    product: Array = parts["down"] @ activate(body.activation, variables) + parts.get("down_bias", 0.0)
    return product
