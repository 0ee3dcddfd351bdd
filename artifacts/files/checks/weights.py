"""Whether the weight files hold what the model takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.layout.chain import (
    attention_weights,
    state_step_weights,
)
from moec.artifacts.layout.experts import layout
from moec.artifacts.paths import experts_name
from moec.artifacts.steps import AttentionStep, SegmentStep, StateStep

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from moec.artifacts.files.safetensors import TensorPlace
    from moec.artifacts.ids import TensorName
    from moec.artifacts.model import ModelRecord, TensorSpec


def dense_problems(model: ModelRecord, table: Mapping[TensorName, TensorPlace]) -> Iterator[str]:
    """What the chain expects of ``weights/dense.safetensors`` and does not find."""
    functions = {function.name: function for function in model.functions}
    attentions = {attention.name: attention for attention in model.attentions}
    states = {state.name: state for state in model.states}
    for number, step in enumerate(model.all_steps):
        wanted: Iterable[tuple[TensorName, TensorSpec]] = ()
        if isinstance(step, AttentionStep) and step.attention in attentions:
            wanted = attention_weights(attentions[step.attention], step).items()
        elif isinstance(step, StateStep) and step.state in states:
            wanted = state_step_weights(states[step.state], step).items()
        elif isinstance(step, SegmentStep) and step.function in functions:
            wanted = zip(step.weights, functions[step.function].weights, strict=False)
        for name, spec in wanted:
            if name not in table:
                yield f"step {number} uses the weight {name}, which is not there"
            elif not _same_tensor(table[name], spec):
                yield f"step {number} uses the weight {name}, which has another type or shape"


def _same_tensor(place: TensorPlace, spec: TensorSpec) -> bool:
    return (place.dtype, place.shape) == (spec.stored.dtype, spec.stored.shape)


def experts_problems(model: ModelRecord, sizes: Mapping[str, int]) -> Iterator[str]:
    """Which expert files (path to size in bytes) are not laid out as ``artifacts.layout.experts`` says."""
    bodies = {body.name: body for body in model.bodies}
    for layer in model.experts:
        expected = layer.experts * layout(bodies[layer.body]).stride_bytes
        found = sizes.get(experts_name(layer.layer))
        if found != expected:
            yield f"{experts_name(layer.layer)} has {found} bytes instead of {expected}"
