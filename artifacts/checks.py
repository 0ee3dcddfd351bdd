"""Whether the records of a bundle agree with each other and with the weight files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.cache import cached_form
from moec.artifacts.experts import layout
from moec.artifacts.ids import ValueId
from moec.artifacts.model import (
    AppendStep,
    AttentionStep,
    CapacityStep,
    SegmentStep,
    SelectionStep,
    StateStep,
    TensorSpec,
)
from moec.artifacts.paths import PROGRAM_NAME, experts_name, program_name
from moec.artifacts.states import state_inputs, state_output, state_weights
from moec.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from moec.artifacts.ids import TensorName
    from moec.artifacts.manifest import Manifest
    from moec.artifacts.model import AttentionSpec, ModelRecord, Step
    from moec.artifacts.safetensors import TensorPlace
    from moec.artifacts.schedule import LayerProfile, LayerSchedule, Schedule, ScheduleRecord
    from moec.artifacts.states import StateSpec

CHAIN_INPUTS = (ValueId("tokens"), ValueId("positions"))
CHAIN_OUTPUT = ValueId("logits")


def model_problems(model: ModelRecord) -> Iterator[str]:
    """What is inconsistent within ``model.json``, one sentence each."""
    yield from _duplicates("function", [function.name for function in model.functions])
    yield from _duplicates("attention", [attention.name for attention in model.attentions])
    yield from _duplicates("selection", [selection.name for selection in model.selections])
    yield from _duplicates("state", [state.name for state in model.states])
    yield from _duplicates("expert body", [body.name for body in model.bodies])
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
            yield from (f"step {number} {problem}" for problem in _step_problems(model, step))
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


def _step_problems(model: ModelRecord, step: Step) -> Iterator[str]:
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
        if layer.capacity < 1 or layer.top_k != 1:
            yield f"drops tokens of MoE layer {step.layer}, which has no capacity or several choices"


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
    """Which expert files (path to size in bytes) are not laid out as ``artifacts.experts.layout`` says."""
    bodies = {body.name: body for body in model.bodies}
    for layer in model.experts:
        expected = layer.experts * layout(bodies[layer.body]).stride_bytes
        found = sizes.get(experts_name(layer.layer))
        if found != expected:
            yield f"{experts_name(layer.layer)} has {found} bytes instead of {expected}"


def schedule_problems(model: ModelRecord, record: ScheduleRecord) -> Iterator[str]:
    """What in ``schedule.json`` does not fit the experts of the model."""
    if [profile.layer for profile in record.profile.layers] != [layer.layer for layer in model.experts]:
        yield "the routing profile is not for the MoE layers of this model"
        return
    for profile in record.profile.layers:
        yield from _profile_problems(model, profile)
    for number, schedule in enumerate(record.schedules):
        yield from (f"schedule {number}: {problem}" for problem in _one_schedule_problems(model, schedule))


def _profile_problems(model: ModelRecord, profile: LayerProfile) -> Iterator[str]:
    experts = model.experts[profile.layer].experts
    where = f"the routing profile of MoE layer {profile.layer}"
    if sorted(profile.order) != list(range(experts)) or {len(profile.use_share), len(profile.slot_value)} != {
        experts
    }:
        yield f"{where} does not rank its {experts} experts"
    if not profile.transitions:
        return
    following = model.experts[profile.layer + 1].experts if profile.layer + 1 < len(model.experts) else 0
    if len(profile.transitions) != experts:
        yield f"{where} has transitions for {len(profile.transitions)} of {experts} experts"
    if any(not 0 <= expert < following for row in profile.transitions for expert in row):
        yield f"{where} has a transition to an expert that the next MoE layer does not have"


def _one_schedule_problems(model: ModelRecord, schedule: Schedule) -> Iterator[str]:
    layers = [layer.layer for layer in model.experts]
    if [layer.layer for layer in schedule.layers] != layers:
        yield "it is not for the MoE layers of this model"
        return
    if sorted(schedule.prefill.order) != layers:
        yield "prefill does not stream every MoE layer once"
    for layer in schedule.layers:
        yield from (f"MoE layer {layer.layer}: {problem}" for problem in _layer_problems(model, layer))
    for tier, budget in (
        (schedule.device, schedule.budgets.device_memory_bytes),
        (schedule.host, schedule.budgets.host_memory_bytes),
    ):
        if tier.total > budget:
            yield f"it needs {tier.total} bytes of a budget of {budget}"


def _layer_problems(model: ModelRecord, layer: LayerSchedule) -> Iterator[str]:
    experts, top_k = model.experts[layer.layer].experts, model.experts[layer.layer].top_k
    if layer.slots > experts or layer.host_experts > experts:
        yield f"{layer.slots} slots and {layer.host_experts} host experts, but only {experts} experts"
    if layer.seeds > layer.slots:
        yield f"{layer.seeds} seeds for {layer.slots} slots"
    if len(layer.cpu_share) != top_k + 1 or any(not 0 <= c <= m for m, c in enumerate(layer.cpu_share)):
        yield f"its CPU share is not one for 0 to {top_k} misses"


def manifest_problems(manifest: Manifest) -> Iterator[str]:
    """What in ``manifest.json`` does not belong together."""
    yield from _duplicates("target", [target.name for target in manifest.targets])
    if not manifest.targets:
        yield "there is no target"
    named: list[str] = [path for target in manifest.targets for path in target.files]
    named += manifest.tokenizer.files if manifest.tokenizer else ()
    for path in named:
        if path not in manifest.files:
            yield f"{path} is named but not in the file table"
    for target in manifest.targets:
        if not target.files:
            yield f"target {target.name} has no files"
        elif program_name(target.name) not in target.files:
            yield f"target {target.name} has no {PROGRAM_NAME}"


def _duplicates(what: str, names: Sequence[str]) -> Iterable[str]:
    return [
        f"there are two {what}s called {name}" for name in sorted({n for n in names if names.count(n) > 1})
    ]
