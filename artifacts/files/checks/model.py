"""Whether the parts of ``model.json`` agree with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.files.checks.names import twice
from moec.artifacts.files.checks.steps import step_problems
from moec.artifacts.layout.cache import cached_form
from moec.artifacts.layout.chain import (
    CHAIN_INPUTS,
    CHAIN_OUTPUT,
    step_values,
)
from moec.artifacts.steps import AppendStep, AttentionStep
from moec.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.artifacts.ids import ValueId
    from moec.artifacts.model import ModelRecord


def model_problems(model: ModelRecord) -> Iterator[str]:
    """What is inconsistent within ``model.json``, one sentence each."""
    yield from twice("function", [function.name for function in model.functions])
    yield from twice("attention", [attention.name for attention in model.attentions])
    yield from twice("selection", [selection.name for selection in model.selections])
    yield from twice("state", [state.name for state in model.states])
    yield from twice("expert body", [body.name for body in model.bodies])
    if [layer.layer for layer in model.experts] != list(range(len(model.experts))):
        yield "the MoE layers are not numbered from 0"
    yield from _format_problems(model)
    bodies = {body.name for body in model.bodies}
    for layer in model.experts:
        if layer.body not in bodies:
            yield f"MoE layer {layer.layer} has the unknown expert body {layer.body}"
        if not 1 <= layer.top_k <= layer.experts:
            yield f"MoE layer {layer.layer} chooses {layer.top_k} of {layer.experts} experts"
    if model.last_step > len(model.steps):
        yield f"last_step is {model.last_step}, but there are {len(model.steps)} steps"
    yield from _chain_problems(model)


def _format_problems(model: ModelRecord) -> Iterator[str]:
    for body in model.bodies:
        if body.format is not None and body.format not in FORMATS:
            yield f"the expert body {body.name} is of the unknown format {body.format}"
    for function in model.functions:
        for spec in function.weights:
            if spec.format is not None and (spec.format not in FORMATS or len(spec.shape) != 2):
                yield f"{function.name} has a weight {list(spec.shape)} of the unknown format {spec.format}"
        if any(spec.format is not None for spec in (*function.inputs, *function.outputs)):
            yield f"{function.name} has an activation that is quantized"


def _chain_problems(model: ModelRecord) -> Iterator[str]:
    for value, spec in model.values.items():
        if spec.dtype in ("bfloat16", "float16"):
            yield f"the value {value} is {spec.dtype}, but values are computed in float32"
    made: set[ValueId] = set()
    for first, steps in ((0, model.steps), (len(model.steps), model.encoder)):
        known = set(CHAIN_INPUTS)
        for number, step in enumerate(steps, first):
            reads, writes = step_values(step)
            for value in reads:
                if value not in known:
                    yield f"step {number} reads the value {value}, which no step before it makes"
            for value in writes:
                if value in known | made:
                    yield f"step {number} makes the value {value} again"
                if value not in model.values:
                    yield f"step {number} makes the value {value}, which is not described"
            known.update(writes)
            yield from (f"step {number} {problem}" for problem in step_problems(model, step))
        made |= known - set(CHAIN_INPUTS)
        if steps is model.steps and CHAIN_OUTPUT not in known:
            yield f"no step makes {CHAIN_OUTPUT}"
    yield from _cache_problems(model)


def _cache_problems(model: ModelRecord) -> Iterator[str]:
    """Whether all steps of an attention layer cache the same, and what ``cross`` ones read was written."""
    attentions = {spec.name: spec for spec in model.attentions}
    forms: dict[int, tuple[object, ...]] = {}
    steps = [step for step in model.all_steps if isinstance(step, (AttentionStep, AppendStep))]
    for step in steps:
        spec = attentions.get(step.attention)
        if spec is not None and forms.setdefault(step.layer, cached_form(spec)) != cached_form(spec):
            yield f"attention layer {step.layer} has caches of several forms"
    appended = {step.layer for step in steps if isinstance(step, AppendStep)}
    for step in steps:
        spec = attentions.get(step.attention)
        if isinstance(step, AttentionStep) and spec is not None and spec.cross and step.layer not in appended:
            yield f"the encoder writes no keys for attention layer {step.layer}"
