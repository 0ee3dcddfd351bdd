"""What a model will take on the host, held against the budget before it is allocated. Pure arithmetic."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.cache import PAGE_TOKENS
from moec.artifacts.experts import layout
from moec.artifacts.model import DTYPE_BYTES, AttentionSpec, AttentionStep, SegmentStep
from moec.errors import BudgetError, RequestError
from moec.runtime.cache.pages import pages_for

if TYPE_CHECKING:
    from moec.artifacts.model import ModelRecord, TensorSpec

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}
_UNITS |= {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "tb": 10**12, "tib": 1 << 40}

ROW_BLOCK = 128
"""Rows of logits computed at once."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the host by purpose; within the budget, if there is one."""

    dense_bytes: int
    cache_bytes: int
    cache_pages: int
    activation_bytes: int
    """Of the largest step, an upper bound."""
    expert_capacity_bytes: int
    """The most expert bytes resident at once."""
    expert_bytes: int
    """All routed experts."""

    @property
    def total_bytes(self) -> int:
        """The most that will be resident."""
        experts = min(self.expert_capacity_bytes, self.expert_bytes)
        return self.dense_bytes + self.cache_bytes + self.activation_bytes + experts


def parse_memory(value: int | float | str, total_bytes: int, name: str) -> int:
    """Bytes of a budget: an integer, ``"8GiB"``, ``"75%"``, or a ratio of ``total_bytes`` up to 1.

    Raises:
        RequestError: it is none of these, or not above 0.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z%]*)\s*", value)
        unit = match[2].lower() if match else "?"
        if match and unit == "%":
            value = float(match[1]) / 100
        elif match and (unit in _UNITS) and not (unit == "" and "." in match[1]):
            value = int(float(match[1]) * _UNITS[unit])
        elif match and unit == "":
            value = float(match[1])
    if isinstance(value, float) and 0 < value <= 1:
        value = int(total_bytes * value)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise RequestError(
            f"{name}={value!r} is not an amount of memory.",
            "It must be bytes, a text such as 8GiB or 75%, or a ratio of all memory such as 0.75.",
            f"Change {name}.",
        )
    return value


def page_bytes(model: ModelRecord) -> int:
    """Bytes of one page of the key-value cache, all attention layers together."""
    specs = {spec.name: spec for spec in model.attentions}
    steps = (step for step in model.steps if isinstance(step, AttentionStep))
    return sum(PAGE_TOKENS * token_bytes(specs[step.attention]) for step in steps)


def token_bytes(spec: AttentionSpec) -> int:
    """Bytes that one layer of this attention caches for one token."""
    width = spec.key_dim + (0 if spec.latent else spec.value_dim)
    return spec.kv_heads * width * DTYPE_BYTES[spec.dtype]


def tensor_bytes(spec: TensorSpec, tokens: int) -> int:
    """Bytes of a tensor with T = ``tokens``."""
    return math.prod(tokens if extent == "T" else extent for extent in spec.shape) * DTYPE_BYTES[spec.dtype]


def activation_bytes(model: ModelRecord, step_tokens: int, max_batch: int) -> int:
    """An upper bound of what one step of ``step_tokens`` tokens allocates.

    All values of the chain that could be alive at once, and inside a segment every product's result in
    float32; an embedding is a look-up, not a product; after ``last_step`` only `ROW_BLOCK` rows at a time,
    whose logits exist in both types.
    """
    functions = {function.name: function for function in model.functions}
    largest = 0
    for number, step in enumerate(model.steps):
        tokens = step_tokens if number < model.last_step else min(step_tokens, ROW_BLOCK)
        inside = 0
        if isinstance(step, SegmentStep):
            function = functions[step.function]
            wide = sum(_rows(spec) for spec in function.weights if len(spec.shape) >= 2)
            if number < model.last_step:
                wide -= sum(spec.shape[0] == model.vocab_size for spec in function.weights) * model.vocab_size
            inside = wide * tokens * 4 + sum(tensor_bytes(spec, tokens) for spec in function.outputs)
        largest = max(largest, inside)
    alive = max(
        (tensor_bytes(spec, step_tokens) for name, spec in model.values.items() if name != "logits"),
        default=0,
    )
    logits = model.vocab_size * 4 * (max_batch + ROW_BLOCK)
    return largest + 6 * alive + logits


def _rows(weight: TensorSpec) -> int:
    """Numbers that a product with ``weight`` gives for one token."""
    return math.prod(int(extent) for extent in weight.shape[:-1])


def plan_memory(
    model: ModelRecord,
    dense_bytes: int,
    *,
    host_memory: int | None,
    available_bytes: int,
    cache_tokens: int | None,
    max_batch: int,
    max_step_tokens: int,
) -> MemoryPlan:
    """Divide the host's memory.

    Args:
        model: the chain.
        dense_bytes: of the mapped file of dense weights.
        host_memory: the budget in bytes; ``None``: no limit.
        available_bytes: what the machine has free, to size the cache where ``cache_tokens`` is ``None``.
        cache_tokens: tokens of key-value cache, all sequences together. ``None``: ``max_batch`` full
            contexts, but no more than a quarter of the budget or of what is free.
        max_batch: sequences at once.
        max_step_tokens: tokens of the largest step.

    Raises:
        BudgetError: the budget does not hold the least that is needed; nothing was allocated.
    """
    strides = {body.name: layout(body).stride_bytes for body in model.bodies}
    all_experts = sum(layer.experts * strides[layer.body] for layer in model.experts)
    least_experts = max((layer.top_k * strides[layer.body] for layer in model.experts), default=0)
    activations = activation_bytes(model, max_step_tokens, max_batch)
    page = page_bytes(model)
    limit = available_bytes if host_memory is None else host_memory
    if cache_tokens is None:
        wanted = max_batch * pages_for(model.max_context)
        pages = max(1, min(wanted, limit // 4 // max(1, page)))
        if host_memory is not None:
            room = host_memory - dense_bytes - activations - least_experts
            pages = max(1, min(pages, room // max(1, page)))
    else:
        pages = pages_for(cache_tokens)
    fixed = dense_bytes + pages * page + activations
    if host_memory is not None and fixed + least_experts > host_memory:
        raise _too_small(host_memory, dense_bytes, pages * page, activations, least_experts)
    capacity = all_experts if host_memory is None else min(all_experts, host_memory - fixed)
    return MemoryPlan(dense_bytes, pages * page, pages, activations, capacity, all_experts)


def _too_small(budget: int, dense: int, cache: int, activations: int, experts: int) -> BudgetError:
    needed = dense + cache + activations + experts
    return BudgetError(
        f"host_memory is {needed - budget} bytes too small: {budget} of at least {needed}.",
        f"Dense weights take {dense} bytes, the key-value cache {cache}, "
        f"activations {activations}, and the experts of one token {experts}.",
        "Raise host_memory, or lower cache_tokens, max_step_tokens or max_batch.",
    )
