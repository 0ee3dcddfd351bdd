"""From the records and a loaded target to what the calls of steps are made of: every name is looked up here, once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from moec.artifacts.layout.chain import CHAIN_INPUTS
from moec.artifacts.program import resolve
from moec.artifacts.steps import AttentionStep, SegmentStep
from moec.runtime.chain.arena import plan_arena
from moec.runtime.chain.layout import (
    LocalKey,
    ValueKey,
    WorkspaceKey,
    beside_of,
    chain_layout,
    crossing_values,
    kernel_name,
    value_spec,
)
from moec.runtime.device import View

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moec.artifacts.ids import TensorName, ValueId
    from moec.artifacts.model import AttentionSpec
    from moec.artifacts.program import Beside, ProgramRecord, SegmentProgram
    from moec.artifacts.sections import Section
    from moec.runtime.cache.states import StateStorage
    from moec.runtime.cache.storage import CacheStorage
    from moec.runtime.chain.layout import Part
    from moec.runtime.chain.mirrors import BatchMirrors
    from moec.runtime.device import Device, Functions, Memory
    from moec.runtime.experts.calls import ExpertCalls
    from moec.runtime.routing.recorder import RoutingRecorder


AttentionKind: TypeAlias = Literal["causal", "whole", "cross"]


class Binder:
    """Functions, and where each tensor lies, whatever the step; ``calls.py`` makes calls of them.

    Args:
        device: what runs them.
        section: its model and dense weights, and what comes from other devices and goes to them.
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
        section: Section,
        program: ProgramRecord,
        functions: Functions,
        cache: CacheStorage,
        states: StateStorage,
        experts: ExpertCalls,
        tokens: int,
        rows: int,
        resident: Mapping[TensorName, int] | None = None,
    ) -> None:
        self.section, self.model = section, section.bundle.model
        self.crossing = tuple(crossing_values(self.model, section.arriving))
        self._device, self._bundle, self._experts = device, section.bundle, experts
        self._cache, self._states = cache, states
        self._program = program
        self._segments = {segment.name: segment for segment in program.segments}
        self._workspaces = {workspace.function: workspace for workspace in program.workspaces}
        layout = chain_layout(self.model, program, tokens, rows, section.arriving, section.leaving)
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

    def rooted(self, places: Mapping[ValueId, int]) -> dict[ValueId, int]:
        """``places`` of values as places of the values whose memory they lie in."""
        own: tuple[Part, ...] = ("main", "last")
        return {
            self._roots[key].name: places[key.name]
            for key in (ValueKey(part, name) for part in own for name in places)
            if key in self._roots
        }

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
        """Where a value of the chain lies; arguments as for `moec.runtime.chain.calls.part_calls`."""
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
        layer += self.section.experts_before
        recorder.record(layer, self._device.read(views[1]), self._device.read(views[2]))
        if self._device.kind == "cpu":
            recorder.see(layer, self._device.read(views[0]))

    def tensor(self, view: View) -> Any:
        """A tensor of the device."""
        return self._device.tensor(view)

    def beside(self, number: int, count: int) -> Beside | None:
        """What runs the experts of step ``number`` together with the side segment before them."""
        if not 0 < number < len(self.model.all_steps):
            return None
        found = beside_of(self.model, self._program, number)
        if found is None or count > found.most_tokens:
            return None
        return found if self._experts.runs_beside(found) else None

    def _function_names(self) -> list[str]:
        names: dict[str, None] = dict.fromkeys(each.function for each in self._program.beside)
        for step in self.model.all_steps:
            if isinstance(step, SegmentStep):
                names.update(dict.fromkeys(call.function for call in self._segments[step.function].calls))
            else:
                names[kernel_name(self.model, step)] = None
        return list(names)


def _kind(spec: AttentionSpec) -> AttentionKind:
    return "cross" if spec.cross else "causal" if spec.causal else "whole"
