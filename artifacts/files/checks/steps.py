"""Whether a step of the chain is given what its function, attention, state or experts take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.model import TensorSpec
from moec.artifacts.states import state_inputs, state_output, state_weights
from moec.artifacts.steps import (
    AppendStep,
    AttentionStep,
    CapacityStep,
    SegmentStep,
    SelectionStep,
    StateStep,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.artifacts.model import AttentionSpec, ModelRecord
    from moec.artifacts.steps import Step


def step_problems(model: ModelRecord, step: Step) -> Iterator[str]:
    """What is wrong with one step, as the rest of a sentence that begins with it."""
    if isinstance(step, SegmentStep):
        yield from _segment_problems(model, step)
    elif isinstance(step, (AttentionStep, AppendStep)):
        attention = next((spec for spec in model.attentions if spec.name == step.attention), None)
        if attention is None:
            yield f"uses the unknown attention {step.attention}"
        elif isinstance(step, AttentionStep):
            yield from _attention_problems(attention, step)
        elif not attention.cross:
            yield f"appends for the attention {step.attention}, which does so itself"
    elif isinstance(step, SelectionStep):
        if all(spec.name != step.selection for spec in model.selections):
            yield f"uses the unknown selection {step.selection}"
    elif isinstance(step, StateStep):
        yield from _state_problems(model, step)
    elif not 0 <= step.layer < len(model.experts):
        yield f"uses the unknown MoE layer {step.layer}"
    elif isinstance(step, CapacityStep):
        layer = model.experts[step.layer]
        if (layer.capacity > 0) == (layer.capacity_share > 0):
            yield f"drops tokens of MoE layer {step.layer}, which has no capacity or two"


def _segment_problems(model: ModelRecord, step: SegmentStep) -> Iterator[str]:
    function = next((spec for spec in model.functions if spec.name == step.function), None)
    if function is None:
        yield f"uses the unknown function {step.function}"
        return
    if len(step.weights) != len(function.weights):
        yield f"gives {len(step.weights)} weights to {function.name}, which takes {len(function.weights)}"
    for what, values, specs in (
        ("inputs", step.inputs, function.inputs),
        ("outputs", step.outputs, function.outputs),
    ):
        if len(values) != len(specs):
            yield f"has {len(values)} {what} for {function.name}, which has {len(specs)}"
        for value, spec in zip(values, specs, strict=False):
            if value in model.values and model.values[value] != spec:
                yield f"has the value {value} among its {what}, which is not what {function.name} has there"


def _attention_problems(attention: AttentionSpec, step: AttentionStep) -> Iterator[str]:
    if (
        (step.key is None) != attention.cross
        or (step.value is None) != (attention.latent or attention.cross)
        or (step.sinks is not None) != attention.sinks
        or (step.bias is not None) != (attention.bias_reach > 0)
        or (step.weights is not None) != (attention.heads is not None)
        or (step.selection is not None) != attention.selected
    ):
        yield f"does not have the operands of the attention {step.attention}"
    elif attention.heads is not None and not (attention.latent and attention.kv_heads == 1):
        yield f"uses the attention {step.attention}, whose heads have no latent in common"
    elif not attention.causal and (
        attention.latent or attention.window or attention.chunk or attention.selected
    ):
        yield f"uses the attention {step.attention}, which is not causal and has a window, latents or a selection"
    elif attention.cross and (attention.causal or attention.bias_reach):
        yield f"uses the attention {step.attention}, which has distances to keys of another sequence"


def _state_problems(model: ModelRecord, step: StateStep) -> Iterator[str]:
    spec = next((spec for spec in model.states if spec.name == step.state), None)
    if spec is None:
        yield f"uses the unknown state {step.state}"
        return
    shapes = (*state_inputs(spec), state_output(spec))
    names = (*step.inputs, step.output)
    if (len(names), len(step.weights)) != (len(shapes), len(state_weights(spec))):
        yield f"does not have the operands of the state {step.state}"
        return
    for name, shape in zip(names, shapes, strict=True):
        if name in model.values and model.values[name] != TensorSpec("float32", shape):
            yield f"gives the value {name} to the state {step.state}, which takes another shape there"
