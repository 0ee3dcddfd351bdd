"""What a model needs, in bytes, read off its chain of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.cache import PAGE_TOKENS
from moec.artifacts.checks import CHAIN_INPUTS, CHAIN_OUTPUT, step_values
from moec.artifacts.experts import layout
from moec.artifacts.model import DTYPE_BYTES, AttentionStep, ExpertsStep, SegmentStep

if TYPE_CHECKING:
    from moec.artifacts.ids import LayerId, TensorName, ValueId
    from moec.artifacts.model import ModelRecord, Step, TensorSpec

DENSE_ALIGNMENT = 64
TABLE_ENTRY_BYTES = 8
LOGIT_ROWS = 128
SCRATCH_BYTES = 4
"""Accumulators are float32."""
STREAM_BUFFERS = 2
"""One is filled while the other is read."""


@dataclass(frozen=True)
class LayerFacts:
    """One MoE layer."""

    layer: LayerId
    experts: int
    top_k: int
    expert_bytes: int
    """Bytes read to run one expert."""
    stride_bytes: int
    """Bytes that one expert occupies."""


@dataclass(frozen=True)
class ModelFacts:
    """A model as the scheduler sees it."""

    layers: tuple[LayerFacts, ...]
    dense_bytes: int
    """All weights outside routed experts, each 64-byte aligned."""
    dense_bytes_per_token: int
    """Those that one token reads: of an embedding table, one row."""
    cache_page_bytes: int
    """One page of the key-value cache in all attention layers together."""
    activation_bytes_per_token: int
    """The most that the steps before the last ones need at once, for one token of a step."""
    logits_bytes_per_row: int
    """The same for the last steps, for one row whose logits are wanted."""
    staging_bytes_per_token: int
    """An expert's input and result, for experts that the CPU computes for the GPU."""

    @property
    def table_bytes(self) -> int:
        """The tables that say where each expert is."""
        return TABLE_ENTRY_BYTES * sum(layer.experts for layer in self.layers)

    @property
    def working_set_bytes(self) -> int:
        """The experts a token chooses, in the layer where they are largest; prefill streams such pieces."""
        return max((layer.top_k * layer.stride_bytes for layer in self.layers), default=0)

    def activation_bytes(self, step_tokens: int) -> int:
        """Values of a step of so many tokens; logits are made for at most ``LOGIT_ROWS`` rows at once."""
        rows = min(step_tokens, LOGIT_ROWS)
        return self.activation_bytes_per_token * step_tokens + self.logits_bytes_per_row * rows

    def cache_bytes(self, context_tokens: int) -> int:
        """The key-value cache for ``context_tokens``, in whole pages."""
        return self.cache_page_bytes * -(-context_tokens // PAGE_TOKENS)


def model_facts(model: ModelRecord) -> ModelFacts:
    """Add up what ``model`` needs."""
    weights = _dense_weights(model)
    return ModelFacts(
        layers=_layers(model),
        dense_bytes=sum(-(-_bytes(spec) // DENSE_ALIGNMENT) * DENSE_ALIGNMENT for spec in weights.values()),
        dense_bytes_per_token=_dense_bytes_per_token(model, weights),
        cache_page_bytes=_cache_page_bytes(model),
        activation_bytes_per_token=_peak_bytes(model, 0, model.last_step),
        logits_bytes_per_row=_peak_bytes(model, model.last_step, len(model.steps)),
        staging_bytes_per_token=2 * model.hidden_size * DTYPE_BYTES[model.dtype],
    )


def _layers(model: ModelRecord) -> tuple[LayerFacts, ...]:
    layouts = {body.name: layout(body) for body in model.bodies}
    return tuple(
        LayerFacts(
            layer.layer,
            layer.experts,
            layer.top_k,
            layouts[layer.body].expert_bytes,
            layouts[layer.body].stride_bytes,
        )
        for layer in model.experts
    )


def _bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor, for one token where a dimension is T."""
    size = DTYPE_BYTES[spec.dtype]
    for extent in spec.shape:
        size *= 1 if extent == "T" else extent
    return size


def _dense_weights(model: ModelRecord) -> dict[TensorName, TensorSpec]:
    functions = {function.name: function for function in model.functions}
    weights: dict[TensorName, TensorSpec] = {}
    for step in model.steps:
        if isinstance(step, SegmentStep):
            weights.update(zip(step.weights, functions[step.function].weights, strict=True))
    return weights


def _dense_bytes_per_token(model: ModelRecord, weights: dict[TensorName, TensorSpec]) -> int:
    gathered: set[TensorName] = set()
    read: set[TensorName] = set()
    for step in model.steps:
        if not isinstance(step, SegmentStep):
            continue
        for name in step.weights:
            # Only the embedding meets token ids, and is gathered from; tied, the last product reads it whole.
            embeds = CHAIN_INPUTS[0] in step.inputs and weights[name].shape[0] == model.vocab_size
            (gathered if embeds else read).add(name)
    rows = sum(_bytes(weights[name]) // model.vocab_size for name in gathered - read)
    return rows + sum(_bytes(weights[name]) for name in read)


def _cache_page_bytes(model: ModelRecord) -> int:
    attentions = {attention.name: attention for attention in model.attentions}
    total = 0
    for step in model.steps:
        if isinstance(step, AttentionStep):
            spec = attentions[step.attention]
            head = spec.key_dim + (0 if spec.latent else spec.value_dim)
            total += PAGE_TOKENS * spec.kv_heads * head * DTYPE_BYTES[spec.dtype]
    return total


def _peak_bytes(model: ModelRecord, first: int, last: int) -> int:
    """The most that the steps ``first .. last - 1`` need at once for one token: live values, and scratch."""
    last_use: dict[ValueId, int] = {CHAIN_OUTPUT: len(model.steps)}
    for number, step in enumerate(model.steps):
        for value in step_values(step)[0]:
            last_use[value] = max(number, last_use.get(value, 0))
    live = {value: _bytes(model.values[value]) for value in CHAIN_INPUTS if value in model.values}
    peak = 0
    for number, step in enumerate(model.steps[:last]):
        live.update({value: _bytes(model.values[value]) for value in step_values(step)[1]})
        if number >= first:
            peak = max(peak, sum(live.values()) + _scratch_bytes(model, step))
        live = {value: size for value, size in live.items() if last_use.get(value, -1) > number}
    return peak


def _scratch_bytes(model: ModelRecord, step: Step) -> int:
    """An upper bound of what a step allocates inside, for one token: each product's result, in float32."""
    if isinstance(step, SegmentStep):
        function = next(function for function in model.functions if function.name == step.function)
        embeds = CHAIN_INPUTS[0] in step.inputs
        products = [
            spec.shape[:-1]
            for spec in function.weights
            if len(spec.shape) > 1 and not (embeds and spec.shape[0] == model.vocab_size)
        ]
        return SCRATCH_BYTES * sum(math.prod(int(extent) for extent in shape) for shape in products)
    if isinstance(step, ExpertsStep):
        layer = model.experts[step.layer]
        body = next(body for body in model.bodies if body.name == layer.body)
        return SCRATCH_BYTES * layer.top_k * (body.intermediate * (2 if body.gated else 1))
    return 0
