"""A checkpoint read as arrays, greedy decoding, and the layers that references share."""

from __future__ import annotations

import json
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

Array: TypeAlias = Any
"""A numpy array of float64."""

_ROUNDED: ContextVar[bool] = ContextVar("_ROUNDED", default=False)


class ReferenceModel(Protocol):
    """Logits of a sequence, without a cache."""

    def logits(self, tokens: list[int]) -> Array:
        """``[T, V]`` of T tokens."""
        ...


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """The config, and every tensor of every shard in float64."""
    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return config, {name: value.double().numpy() for name, value in tensors.items()}


def greedy(model: ReferenceModel, prompt: Iterable[int], count: int) -> list[int]:
    """The prompt and ``count`` tokens more, each the likeliest after those before it."""
    tokens = [int(token) for token in prompt]
    for _ in range(count):
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    return tokens


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Each row over its root mean square, times ``scale``."""
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale
    return _to_bfloat16(normed) if _ROUNDED.get() else normed


@contextmanager
def rounded_activations() -> Iterator[None]:
    """Within, what norms give is rounded to bfloat16: a yardstick for what computes in 16 bits."""
    token = _ROUNDED.set(True)
    try:
        yield
    finally:
        _ROUNDED.reset(token)


def _to_bfloat16(x: Array) -> Array:
    rounded: Array = torch.from_numpy(x).bfloat16().double().numpy()
    return rounded


def softmax(x: Array) -> Array:
    """Over the last axis."""
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def rotate(x: Array, theta: float) -> Array:
    """Rotary position embedding of ``[T, heads, D]``, value d together with value d + D/2 (Su et al., 2021)."""
    tokens, _, size = x.shape
    angles = np.arange(tokens)[:, None] * theta ** (-np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attend(query: Array, key: Array, value: Array, scale: float, cap: float = 0.0) -> Array:
    """Causal attention of ``[T, heads, D]`` over ``[T, groups, D]``; logits bent by ``cap`` unless it is 0."""
    tokens, heads, size = query.shape
    each = heads // key.shape[1]
    result = np.zeros((tokens, heads, size))
    future = np.triu(np.ones((tokens, tokens), bool), 1)
    for head in range(heads):
        logits = query[:, head] @ key[:, head // each].T * scale
        if cap:
            logits = cap * np.tanh(logits / cap)
        logits[future] = -np.inf
        result[:, head] = softmax(logits) @ value[:, head // each]
    return result.reshape(tokens, heads * size)
