"""The ends of the chain of steps, and what each step reads, makes and takes of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.ids import ValueId
from moec.artifacts.model import TensorSpec
from moec.artifacts.states import state_weights
from moec.artifacts.steps import (
    AppendStep,
    AttentionStep,
    CapacityStep,
    SegmentStep,
    SelectionStep,
    StateStep,
)

if TYPE_CHECKING:
    from moec.artifacts.ids import TensorName
    from moec.artifacts.model import AttentionSpec
    from moec.artifacts.states import StateSpec
    from moec.artifacts.steps import Step


CHAIN_INPUTS = (ValueId("tokens"), ValueId("positions"))
CHAIN_OUTPUT = ValueId("logits")


def step_values(step: Step) -> tuple[tuple[ValueId, ...], tuple[ValueId, ...]]:
    """The values that a step reads, and those that it makes."""
    if isinstance(step, SegmentStep):
        return step.inputs, step.outputs
    if isinstance(step, AttentionStep):
        own = (value for value in (step.key, step.value, step.selection) if value is not None)
        return (step.query, *own), (step.output,)
    if isinstance(step, AppendStep):
        return (step.key, step.value), ()
    if isinstance(step, CapacityStep):
        return (step.index, step.weight), (step.output,)
    if isinstance(step, SelectionStep):
        return (step.query, step.weight, step.key), (step.output,)
    if isinstance(step, StateStep):
        return step.inputs, (step.output,)
    return (step.hidden, step.index, step.weight), (step.output,)


def state_step_weights(spec: StateSpec, step: StateStep) -> dict[TensorName, TensorSpec]:
    """The weights of a step that advances a state."""
    shapes = state_weights(spec)
    return {name: TensorSpec("float32", shape) for name, shape in zip(step.weights, shapes, strict=False)}


def attention_weights(attention: AttentionSpec, step: AttentionStep) -> dict[TensorName, TensorSpec]:
    """The weights of an attention step."""
    weights: dict[TensorName, TensorSpec] = {}
    if step.sinks is not None:
        weights[step.sinks] = TensorSpec("float32", (attention.query_heads,))
    if step.bias is not None:
        shape = (attention.query_heads, 2 * attention.bias_reach + 1)
        weights[step.bias] = TensorSpec("float32", shape)
    if step.weights is not None and attention.heads is not None:
        heads, rank = attention.heads, attention.value_dim
        for name, matrix in (
            (step.weights.absorb, (rank, heads.nope_dim)),
            (step.weights.expand, (heads.nope_dim, rank)),
            (step.weights.value, (heads.value_dim, rank)),
        ):
            weights[name] = TensorSpec(heads.dtype, (attention.query_heads, *matrix))
    return weights
