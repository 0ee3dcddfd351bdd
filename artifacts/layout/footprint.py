"""What a model needs, in bytes, read off its chain: the one place where planner and runtime do this arithmetic."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.layout.cache import PAGE_TOKENS, cache_layers
from moec.artifacts.layout.chain import (
    CHAIN_INPUTS,
    CHAIN_OUTPUT,
    attention_weights,
    state_step_weights,
    step_values,
)
from moec.artifacts.layout.experts import layout
from moec.artifacts.model import DTYPE_BYTES, TensorSpec
from moec.artifacts.states import state_bytes
from moec.artifacts.steps import (
    AppendStep,
    AttentionStep,
    CapacityStep,
    ExpertsStep,
    SegmentStep,
    SelectionStep,
    StateStep,
)

if TYPE_CHECKING:
    from moec.artifacts.ids import LayerId, TensorName, ValueId
    from moec.artifacts.model import AttentionSpec, ExpertBody, ExpertsLayer, ModelRecord, SelectionSpec
    from moec.artifacts.states import StateSpec
    from moec.artifacts.steps import Step

DENSE_ALIGNMENT = 64
TABLE_ENTRY_BYTES = 8
LOGIT_ROWS = 128
"""The runtime computes logits of so many rows at once."""
GRAPH_BYTES = 32 << 20
"""Set aside on a GPU for captured graphs, which the driver keeps there."""
CODE_BYTES = GRAPH_BYTES + (32 << 20)
"""Taken for graphs and machine code where nothing is compiled yet."""
VALUE_BYTES = 4
"""Values and whatever a step makes inside are float32."""


@dataclass(frozen=True)
class LayerFootprint:
    """One MoE layer."""

    layer: LayerId
    experts: int
    top_k: int
    expert_bytes: int
    """Bytes read to run one expert."""
    stride_bytes: int
    """Bytes that one expert occupies."""
    second_bytes: int = 0
    """Where in an expert ``down`` begins: what comes before is read by the first of its products."""
    quantized: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model, by what they are for."""

    layers: tuple[LayerFootprint, ...]
    dense_bytes: int
    """All weights outside routed experts, each 64-byte aligned."""
    dense_bytes_per_token: int
    """Those that one token reads: of an embedding table, one row."""
    attention_steps: int
    """Attention layers."""
    cache_page_bytes: int
    """One page of the key-value cache in all attention layers together."""
    sequence_bytes: int
    """The states of one sequence, in all layers that have one."""
    activation_bytes_per_token: int
    """The most that the steps before the last ones need at once, for one token of a step."""
    logits_bytes_per_row: int
    """The same for the last steps, for one row whose logits are wanted."""
    result_bytes_per_row: int
    """The logits of one row by themselves."""
    staging_bytes_per_token: int
    """An expert's input and result, for experts that the CPU computes for a GPU."""

    @property
    def table_bytes(self) -> int:
        """The tables that say where each expert is."""
        return TABLE_ENTRY_BYTES * sum(layer.experts for layer in self.layers)

    @property
    def working_set_bytes(self) -> int:
        """The experts a token chooses, in the layer where they are largest."""
        return max((layer.top_k * layer.stride_bytes for layer in self.layers), default=0)

    @property
    def experts_bytes(self) -> int:
        """All routed experts."""
        return sum(layer.experts * layer.stride_bytes for layer in self.layers)

    def activation_bytes(self, step_tokens: int, sequences: int = 1) -> int:
        """Values of a step of so many tokens, of which ``sequences`` rows have their logits wanted.

        Logits are made for at most ``LOGIT_ROWS`` rows at once; where more are wanted, the pieces and the whole
        exist side by side.
        """
        rows = min(step_tokens, LOGIT_ROWS)
        joined = 2 * sequences * self.result_bytes_per_row if sequences > LOGIT_ROWS else 0
        return self.activation_bytes_per_token * step_tokens + self.logits_bytes_per_row * rows + joined

    def states_bytes(self, max_batch: int) -> int:
        """The states of so many sequences at once, and of one more that logits are asked of."""
        return self.sequence_bytes * (max_batch + 1)

    def cache_bytes(self, context_tokens: int) -> int:
        """The key-value cache for ``context_tokens``, in whole pages."""
        return self.cache_page_bytes * -(-context_tokens // PAGE_TOKENS)


def footprint(model: ModelRecord) -> Footprint:
    """Add up what ``model`` needs."""
    weights = dense_weights(model)
    return Footprint(
        layers=_layers(model),
        dense_bytes=sum(map(dense_bytes, weights.values())),
        dense_bytes_per_token=_dense_bytes_per_token(model, weights),
        attention_steps=sum(isinstance(step, AttentionStep) for step in model.steps),
        cache_page_bytes=_cache_page_bytes(model),
        sequence_bytes=sum(state_bytes(spec) for spec in state_layers(model)),
        activation_bytes_per_token=max(
            _peak_bytes(model, model.steps, 0, model.last_step),
            _peak_bytes(model, model.encoder, 0, len(model.encoder)),
        ),
        logits_bytes_per_row=_peak_bytes(model, model.steps, model.last_step, len(model.steps)),
        result_bytes_per_row=VALUE_BYTES * model.vocab_size,
        staging_bytes_per_token=2 * model.hidden_size * VALUE_BYTES,
    )


def dense_weights(model: ModelRecord) -> dict[TensorName, TensorSpec]:
    """Every weight outside routed experts that a step of the chain reads."""
    functions = {function.name: function for function in model.functions}
    attentions = {attention.name: attention for attention in model.attentions}
    states = {state.name: state for state in model.states}
    weights: dict[TensorName, TensorSpec] = {}
    for step in model.all_steps:
        if isinstance(step, SegmentStep):
            weights.update(zip(step.weights, functions[step.function].weights, strict=True))
        elif isinstance(step, AttentionStep):
            weights.update(attention_weights(attentions[step.attention], step))
        elif isinstance(step, StateStep):
            weights.update(state_step_weights(states[step.state], step))
    return weights


def state_layers(model: ModelRecord) -> tuple[StateSpec, ...]:
    """The state of each layer that has one, in order."""
    specs = {spec.name: spec for spec in model.states}
    steps = [step for step in model.steps if isinstance(step, StateStep)]
    return tuple(specs[step.state] for step in sorted(steps, key=lambda step: step.layer))


def format_bytes(model: ModelRecord) -> dict[str, int]:
    """Bytes of weights in each format or plain element type, without padding; the most first."""
    found: dict[str, int] = defaultdict(int)
    for spec in dense_weights(model).values():
        found[spec.format or spec.dtype] += tensor_bytes(spec)
    bodies = {body.name: body for body in model.bodies}
    for layer in model.experts:
        body = bodies[layer.body]
        for part in layout(body).parts:
            found[body.format or body.dtype if len(part.shape) > 1 else body.dtype] += (
                layer.experts * part.size_bytes
            )
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def encoder_experts(model: ModelRecord) -> tuple[int, ...]:
    """The MoE layers of the encoder, in order."""
    return tuple(sorted(step.layer for step in model.encoder if isinstance(step, ExpertsStep)))


def selection_layers(model: ModelRecord) -> tuple[SelectionSpec, ...]:
    """The selection of each layer that has one, in order."""
    specs = {spec.name: spec for spec in model.selections}
    steps = [step for step in model.steps if isinstance(step, SelectionStep)]
    return tuple(specs[step.selection] for step in sorted(steps, key=lambda step: step.layer))


def cache_token_bytes(spec: AttentionSpec) -> int:
    """What one layer of this attention caches for one token."""
    width = spec.key_dim + (0 if spec.latent else spec.value_dim)
    return spec.kv_heads * width * DTYPE_BYTES[spec.dtype]


def layer_footprint(layer: ExpertsLayer, body: ExpertBody) -> LayerFootprint:
    """A MoE layer whose experts are of ``body``."""
    place = layout(body)
    second = place.part("down").offset_bytes
    return LayerFootprint(
        layer.layer,
        layer.experts,
        layer.top_k,
        place.expert_bytes,
        place.stride_bytes,
        second,
        body.format is not None,
    )


def dense_bytes(spec: TensorSpec) -> int:
    """What a dense weight takes with what lies between it and the next one."""
    return -(-tensor_bytes(spec) // DENSE_ALIGNMENT) * DENSE_ALIGNMENT


def _layers(model: ModelRecord) -> tuple[LayerFootprint, ...]:
    bodies = {body.name: body for body in model.bodies}
    return tuple(layer_footprint(layer, bodies[layer.body]) for layer in model.experts)


def tensor_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor, for one token where a dimension is T."""
    stored = spec.stored
    return DTYPE_BYTES[stored.dtype] * math.prod(1 if extent == "T" else extent for extent in stored.shape)


def looked_up(model: ModelRecord, step: Step, spec: TensorSpec) -> bool:
    """Whether a step takes rows of one of its weights by token ids, as of an embedding, and multiplies nothing."""
    return (
        isinstance(step, SegmentStep)
        and CHAIN_INPUTS[0] in step.inputs
        and spec.shape[:1] == (model.vocab_size,)
    )


def _dense_bytes_per_token(model: ModelRecord, weights: dict[TensorName, TensorSpec]) -> int:
    gathered: set[TensorName] = set()
    read: set[TensorName] = set()
    for step in model.steps:
        if isinstance(step, AttentionStep):
            # One token attends to latents as they are: nothing is expanded for it.
            read.update(name for name in (step.sinks, step.bias) if name is not None)
            read.update((step.weights.absorb, step.weights.value) if step.weights else ())
        if isinstance(step, StateStep):
            read.update(step.weights)
        if not isinstance(step, SegmentStep):
            continue
        for name in step.weights:
            # Only the embedding meets token ids, and is gathered from; tied, the last product reads it whole.
            (gathered if looked_up(model, step, weights[name]) else read).add(name)
    rows = sum(tensor_bytes(weights[name]) // model.vocab_size for name in gathered - read)
    return rows + sum(tensor_bytes(weights[name]) for name in read)


def _cache_page_bytes(model: ModelRecord) -> int:
    index = sum(spec.dim * DTYPE_BYTES[spec.dtype] for spec in selection_layers(model))
    return PAGE_TOKENS * (index + sum(map(cache_token_bytes, cache_layers(model))))


def _peak_bytes(model: ModelRecord, chain: tuple[Step, ...], first: int, last: int) -> int:
    """The most that steps ``first .. last - 1`` of a chain need at once for one token: live values, and scratch."""
    last_use: dict[ValueId, int] = {CHAIN_OUTPUT: len(chain)}
    for number, step in enumerate(chain):
        for value in step_values(step)[0]:
            last_use[value] = max(number, last_use.get(value, 0))
    live = {value: tensor_bytes(model.values[value]) for value in CHAIN_INPUTS if value in model.values}
    peak = 0
    for number, step in enumerate(chain[:last]):
        live.update({value: tensor_bytes(model.values[value]) for value in step_values(step)[1]})
        if number >= first:
            peak = max(peak, sum(live.values()) + _scratch_bytes(model, step))
        live = {value: size for value, size in live.items() if last_use.get(value, -1) > number}
    return peak


def _scratch_bytes(model: ModelRecord, step: Step) -> int:
    """An upper bound of what a step allocates inside, for one token.

    Inside a segment: every product's result, and each input and output once more (normed, rotated, added).
    """
    if isinstance(step, SegmentStep):
        function = next(function for function in model.functions if function.name == step.function)
        products = [
            spec.shape[:-1]
            for spec in function.weights
            if len(spec.shape) > 1 and not looked_up(model, step, spec)
        ]
        inside = VALUE_BYTES * sum(math.prod(int(extent) for extent in shape) for shape in products)
        # Logits come out of their product as they are.
        beside = [
            spec for spec in (*function.inputs, *function.outputs) if model.vocab_size not in spec.shape
        ]
        return inside + sum(map(tensor_bytes, beside))
    if isinstance(step, AttentionStep):
        attention = next(spec for spec in model.attentions if spec.name == step.attention)
        width = attention.key_dim + attention.value_dim if attention.heads else 0
        return VALUE_BYTES * attention.query_heads * width  # queries and results in terms of latents
    if isinstance(step, (AppendStep, CapacityStep, SelectionStep, StateStep)):
        return 0
    layer = model.experts[step.layer]
    body = next(body for body in model.bodies if body.name == layer.body)
    return VALUE_BYTES * layer.top_k * (body.intermediate * (2 if body.gated else 1))
