"""From the records and a loaded target to the calls of a step: every name is looked up here, once.

For each token count the same calls come with tensors of other shapes at the same addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from moec.artifacts.checks import CHAIN_INPUTS
from moec.artifacts.model import (
    AppendStep,
    AttentionStep,
    CapacityStep,
    SegmentStep,
    SelectionStep,
    StateStep,
)
from moec.artifacts.program import resolve
from moec.runtime.arena import plan_arena
from moec.runtime.devices.protocol import HostCall, PackedCall, View
from moec.runtime.layout import (
    LocalKey,
    ValueKey,
    WorkspaceKey,
    beside_of,
    chain_layout,
    crossing_values,
    kernel_name,
    steps_of,
    value_spec,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from moec.artifacts.ids import TensorName, ValueId
    from moec.artifacts.model import AttentionSpec, ExpertsStep, Step
    from moec.artifacts.program import Beside, Operand, ProgramRecord, SegmentProgram
    from moec.artifacts.reader import Bundle
    from moec.runtime.cache.states import StateStorage
    from moec.runtime.cache.storage import CacheStorage
    from moec.runtime.devices.protocol import Call, Device, Functions, Memory
    from moec.runtime.expert_calls import ExpertCalls
    from moec.runtime.layout import Part
    from moec.runtime.mirrors import BatchMirrors
    from moec.runtime.routing import RoutingRecorder


AttentionKind: TypeAlias = Literal["causal", "whole", "cross"]

_TOLD: dict[AttentionKind, tuple[str, ...]] = {
    "causal": ("token_sequence", "token_position"),
    "whole": ("token_sequence", "token_position", "token_last"),
    "cross": ("token_source", "token_last"),
}
"""What an attention kernel is told of each token, in the order of its arguments."""


class Binder:
    """Makes the calls of a step.

    Args:
        device: what runs them.
        bundle: its model and dense weights.
        program: of the target that ``functions`` are of.
        functions: the target's functions.
        cache: keys and values of each attention layer.
        states: the state of each sequence in each layer that has one.
        experts: makes the calls of routed experts.
        tokens: of the largest step.
        rows: the most rows of which logits are made at once.
        resident: addresses of dense weights that are on the device already.

    Raises:
        BundleError: a function is missing in the module.
        BudgetError: the device has too little memory.
    """

    def __init__(
        self,
        device: Device,
        bundle: Bundle,
        program: ProgramRecord,
        functions: Functions,
        cache: CacheStorage,
        states: StateStorage,
        experts: ExpertCalls,
        tokens: int,
        rows: int,
        resident: Mapping[TensorName, int] | None = None,
    ) -> None:
        self.model = bundle.model
        self.crossing = tuple(crossing_values(self.model))
        self._device, self._bundle, self._experts = device, bundle, experts
        self._cache, self._states = cache, states
        self._program = program
        self._segments = {segment.name: segment for segment in program.segments}
        self._workspaces = {workspace.function: workspace for workspace in program.workspaces}
        layout = chain_layout(self.model, program, tokens, rows)
        self._roots = layout.roots
        self._arena = plan_arena(layout.lifetimes)
        self._memory = device.allocate(self._arena.size_bytes)
        self._weights: dict[TensorName, Memory] = {}
        self._resident = resident or {}
        self._lasting: dict[View, Any] = {}
        self._kinds = {spec.name: _kind(spec) for spec in self.model.attentions}
        self._functions = {name: functions.get(name) for name in self._function_names()}

    @property
    def arena_bytes(self) -> int:
        """What all values and locals take."""
        return self._arena.size_bytes

    def calls(
        self,
        part: Part,
        count: int,
        mirrors: BatchMirrors,
        *,
        gathered: bool = False,
        recorder: RoutingRecorder | None = None,
        places: Mapping[ValueId, int] | None = None,
    ) -> list[Call]:
        """The calls of one part of a step, in order.

        Args:
            part: ``main``, ``last`` for the steps from ``last_step`` on, or ``encoder``.
            count: tokens, or in the last part rows.
            mirrors: the step's batch.
            gathered: whether values that cross into the last part have been copied there, row by row.
            recorder: gets every layer's routing from the host, which has a part in the calls then.
            places: addresses of values that are to lie elsewhere than in the arena.
        """
        steps = self.model.all_steps
        binding = _PartBinding(self, part, count, mirrors, gathered, recorder, self._rooted(places or {}))
        return [call for number in steps_of(self.model, part) for call in binding.step(number, steps[number])]

    def _rooted(self, places: Mapping[ValueId, int]) -> dict[ValueId, int]:
        """The same for the values whose memory they lie in."""
        own: tuple[Part, ...] = ("main", "last")
        keys = {
            name: next(key for part in own if (key := ValueKey(part, name)) in self._roots) for name in places
        }
        return {self._roots[key].name: places[name] for name, key in keys.items()}

    def value(
        self,
        part: Part,
        name: ValueId,
        count: int,
        mirrors: BatchMirrors,
        *,
        gathered: bool = False,
        places: Mapping[ValueId, int] | None = None,
    ) -> View:
        """Where a value of the chain lies; arguments as for `calls`."""
        key = self._roots[ValueKey(part, name)]
        if part == "last" and key.name in self.crossing and not gathered:
            key = self._roots[ValueKey("main", key.name)]
        if places and key.name in places:
            address = places[key.name]
        elif key.part == "last" or key.name not in CHAIN_INPUTS:
            address = self.place(key)
        else:
            address = mirrors.chain_input(key.name)
        spec = value_spec(self.model, name)
        return View(address, spec.dtype, resolve(spec.shape, count))

    def place(self, key: ValueKey | LocalKey | WorkspaceKey) -> int:
        """The address of something in the arena."""
        return self._memory.address + self._arena.offsets[key]

    def weight(self, name: TensorName) -> View:
        """A dense weight on the device, brought there once however often it is used."""
        place = self._bundle.dense[name]
        if name in self._resident:
            return View(self._resident[name], place.dtype, place.shape)
        if name not in self._weights:
            self._weights[name] = self._device.hold(self._bundle.dense_view(name))
        return View(self._weights[name].address, place.dtype, place.shape)

    def lasting(self, view: View) -> Any:
        """The tensor of a view whose shape does not depend on the step."""
        if view not in self._lasting:
            self._lasting[view] = self._device.tensor(view)
        return self._lasting[view]

    def function(self, name: str) -> Callable[..., Any]:
        """A packed function of the target."""
        return self._functions[name]

    def segment(self, name: str) -> SegmentProgram:
        """The program of a segment."""
        return self._segments[name]

    def workspace(self, function: str, step: int, call: int, count: int) -> tuple[View, ...]:
        """The extra tensor of a function that needs one."""
        workspace = self._workspaces.get(function)
        if workspace is None:
            return ()
        return (View(self.place(WorkspaceKey(step, call)), "uint8", (workspace.at(count),)),)

    def attention(self, step: AttentionStep) -> AttentionKind:
        """Which keys a step attends to."""
        return self._kinds[step.attention]

    def cache(self, layer: int) -> tuple[Any, ...]:
        """The pages of an attention layer."""
        return self._cache.layer(layer)

    def index(self, layer: int) -> Any:
        """The pages of a selecting layer's indexer."""
        return self._cache.index(layer)

    def states(self, layer: int) -> Any:
        """The states of all sequences in a layer."""
        return self._states.layer(layer)

    def experts(self) -> ExpertCalls:
        """What makes the calls of routed experts."""
        return self._experts

    def record(self, layer: int, views: tuple[View, ...], recorder: RoutingRecorder) -> None:
        """Tell ``recorder`` of a layer's hidden states, choices and weights, which wait for it; see `ExpertCalls`."""
        recorder.record(layer, self._device.read(views[1]), self._device.read(views[2]))
        if self._device.kind == "cpu":
            recorder.see(layer, self._device.read(views[0]))

    def tensor(self, view: View) -> Any:
        """A tensor of the device."""
        return self._device.tensor(view)

    def beside(self, number: int, count: int) -> Beside | None:
        """What runs the experts of step ``number`` together with the side segment before them."""
        if not self._experts.runs_beside or not 0 < number < len(self.model.all_steps):
            return None
        found = beside_of(self.model, self._program, number)
        return found if found is not None and count <= found.most_tokens else None

    def _function_names(self) -> list[str]:
        names: dict[str, None] = dict.fromkeys(each.function for each in self._program.beside)
        for step in self.model.all_steps:
            if isinstance(step, SegmentStep):
                names.update(dict.fromkeys(call.function for call in self._segments[step.function].calls))
            else:
                names[kernel_name(self.model, step)] = None
        return list(names)


class _PartBinding:
    """The calls of one part for one count; tensors of equal views are made once."""

    def __init__(
        self,
        binder: Binder,
        part: Part,
        count: int,
        mirrors: BatchMirrors,
        gathered: bool,
        recorder: RoutingRecorder | None,
        places: Mapping[ValueId, int],
    ) -> None:
        self._binder, self._part, self._count = binder, part, count
        self._mirrors, self._gathered = mirrors, gathered
        self._recorder, self._places = recorder, places
        self._tensors: dict[View, Any] = {}

    def step(self, number: int, step: Step) -> list[Call]:
        if isinstance(step, SegmentStep):
            together = self._binder.beside(number + 1, self._count) is not None
            return [] if together else self._segment(number, step)
        if isinstance(step, AttentionStep):
            return [self._attention(number, step)]
        if isinstance(step, SelectionStep):
            return [self._select(number, step)]
        if isinstance(step, AppendStep):
            return [self._append(step)]
        if isinstance(step, CapacityStep):
            return [self._capacity(step)]
        if isinstance(step, StateStep):
            return [self._state(number, step)]
        return self._routed(number, step)

    def _segment(self, number: int, step: SegmentStep) -> list[Call]:
        binder = self._binder
        calls: list[Call] = []
        for which, call in enumerate(binder.segment(step.function).calls):
            tensors = [self._operand(number, step, operand) for operand in call.operands]
            extra = map(self._tensor, binder.workspace(call.function, number, which, self._count))
            arguments = (*tensors[:-1], *extra, tensors[-1])
            calls.append(PackedCall("segments", binder.function(call.function), arguments))
        return calls

    def _operand(self, number: int, step: SegmentStep, operand: Operand) -> Any:
        view = self._view(number, step, operand)
        return self._binder.lasting(view) if operand.source == "weight" else self._tensor(view)

    def _view(self, number: int, step: SegmentStep, operand: Operand) -> View:
        binder = self._binder
        if operand.source == "weight":
            weight = binder.weight(step.weights[operand.number])
            return View(weight.address, operand.dtype, resolve(operand.shape, 0))
        shape = resolve(operand.shape, self._count)
        if operand.source == "local":
            address = binder.place(LocalKey(number, operand.number))
        else:
            names = step.inputs if operand.source == "input" else step.outputs
            address = self._value(names[operand.number]).address
        return View(address, operand.dtype, shape)

    def _attention(self, number: int, step: AttentionStep) -> Call:
        binder, name = self._binder, kernel_name(self._binder.model, step)
        own = (value for value in (step.query, step.key, step.value) if value is not None)
        arguments = (
            *(self._tensor(self._value(value)) for value in own),
            *binder.cache(step.layer),
            *self._where(*_TOLD[binder.attention(step)]),
            *(() if step.selection is None else (self._tensor(self._value(step.selection)),)),
            *(binder.lasting(binder.weight(weight)) for weight in _weights(step)),
            *map(self._tensor, binder.workspace(name, number, 0, self._count)),
            self._tensor(self._value(step.output)),
        )
        return PackedCall("attention", binder.function(name), arguments)

    def _select(self, number: int, step: SelectionStep) -> Call:
        binder, name = self._binder, kernel_name(self._binder.model, step)
        arguments = (
            *(self._tensor(self._value(value)) for value in (step.query, step.weight, step.key)),
            binder.index(step.layer),
            *self._where("token_sequence", "token_position"),
            *map(self._tensor, binder.workspace(name, number, 0, self._count)),
            self._tensor(self._value(step.output)),
        )
        return PackedCall("attention", binder.function(name), arguments)

    def _append(self, step: AppendStep) -> Call:
        binder = self._binder
        arguments = (
            *(self._tensor(self._value(value)) for value in (step.key, step.value)),
            *binder.cache(step.layer),
            *self._where("token_sequence", "token_position"),
        )
        return PackedCall("attention", binder.function(kernel_name(binder.model, step)), arguments)

    def _capacity(self, step: CapacityStep) -> Call:
        binder = self._binder
        index, weight, out = (
            self._tensor(self._value(name)) for name in (step.index, step.weight, step.output)
        )
        (calls,) = self._each("token_call")
        function = binder.function(kernel_name(binder.model, step))
        return PackedCall("experts", function, (index, weight, calls, out))

    def _where(self, *told: str) -> Iterator[Any]:
        """The page table, and what each token is told of where its keys are."""
        yield self._tensor(self._mirrors.page_table())
        yield from self._each(*told)

    def _each(self, *told: str) -> Iterator[Any]:
        """What each token is told."""
        for name in told:
            yield self._tensor(self._mirrors.each(name, self._count))

    def _state(self, number: int, step: StateStep) -> Call:
        binder, name = self._binder, kernel_name(self._binder.model, step)
        arguments = (
            *(self._tensor(self._value(value)) for value in step.inputs),
            binder.states(step.layer),
            *self._each("token_sequence", "token_position"),
            *(binder.lasting(binder.weight(weight)) for weight in step.weights),
            *map(self._tensor, binder.workspace(name, number, 0, self._count)),
            self._tensor(self._value(step.output)),
        )
        return PackedCall("states", binder.function(name), arguments)

    def _routed(self, number: int, step: ExpertsStep) -> list[Call]:
        binder, name = self._binder, kernel_name(self._binder.model, step)
        views = tuple(self._value(value) for value in (step.hidden, step.index, step.weight, step.output))
        extra = binder.workspace(name, number, 0, self._count)
        beside = binder.beside(number, self._count)
        if beside is not None:
            side = binder.model.all_steps[number - 1]
            assert isinstance(side, SegmentStep)
            products = binder.segment(side.function).calls
            views_beside = (self._view(number - 1, side, each) for call in products for each in call.operands)
            extra, name = (*extra, *views_beside), beside.function
        calls = binder.experts().calls(step.layer, binder.function(name), views, extra)
        return calls if self._recorder is None else [self._record(step.layer, views, self._recorder), *calls]

    def _record(self, layer: int, views: tuple[View, ...], recorder: RoutingRecorder) -> Call:
        return HostCall("experts", lambda: self._binder.record(layer, views, recorder))

    def _value(self, name: ValueId) -> View:
        return self._binder.value(
            self._part, name, self._count, self._mirrors, gathered=self._gathered, places=self._places
        )

    def _tensor(self, view: View) -> Any:
        if view not in self._tensors:
            self._tensors[view] = self._binder.tensor(view)
        return self._tensors[view]


def _weights(step: AttentionStep) -> list[TensorName]:
    """In the order of the kernel's arguments."""
    tables = [name for name in (step.sinks, step.bias) if name is not None]
    matrices = step.weights
    return tables if matrices is None else [*tables, matrices.absorb, matrices.expand, matrices.value]


def _kind(spec: AttentionSpec) -> AttentionKind:
    return "cross" if spec.cross else "causal" if spec.causal else "whole"
