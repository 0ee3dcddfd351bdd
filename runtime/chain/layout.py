"""Everything a step of the chain needs memory for, and from which call to which: what the arena is planned from.

The calls of all steps are numbered through: those before ``last_step``, which run on T tokens, those after it, which
run on the rows whose logits are wanted, and those of an encoder, which run by themselves. Pure arithmetic on the
records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from moec.artifacts.layout.cache import SELECTION_PREFIX
from moec.artifacts.layout.chain import CHAIN_INPUTS, CHAIN_OUTPUT, step_values
from moec.artifacts.model import TensorSpec
from moec.artifacts.program import APPEND, capacity_name, size_bytes
from moec.artifacts.states import STATE_PREFIX
from moec.artifacts.steps import (
    AppendStep,
    AttentionStep,
    CapacityStep,
    ExpertsStep,
    SegmentStep,
    SelectionStep,
    StateStep,
)
from moec.runtime.chain.arena import Lifetime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.ids import ValueId
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.program import Beside, Call, LocalSpec, ProgramRecord, SegmentProgram
    from moec.artifacts.steps import Step

Part: TypeAlias = Literal["encoder", "main", "last"]


class ValueKey(NamedTuple):
    """Memory of a value of the chain; a value that crosses ``last_step`` has a copy of the wanted rows in ``last``."""

    part: Part
    name: ValueId


class LocalKey(NamedTuple):
    """A local of the segment that is step ``step``."""

    step: int
    number: int


class WorkspaceKey(NamedTuple):
    """What call ``call`` of step ``step`` needs beside its tensors."""

    step: int
    call: int
    name: str = "workspace"


Key: TypeAlias = ValueKey | LocalKey | WorkspaceKey


@dataclass(frozen=True)
class ChainLayout:
    """The arena's contents."""

    lifetimes: tuple[Lifetime, ...]
    roots: dict[ValueKey, ValueKey]
    """The memory in which each value lies: its own, or that of a value it is a view of."""


def chain_layout(
    model: ModelRecord,
    program: ProgramRecord,
    tokens: int,
    rows: int,
    arriving: Sequence[ValueId] = (),
    leaving: Sequence[ValueId] = (),
) -> ChainLayout:
    """What a step needs.

    Args:
        model: the chain, or a section of one.
        program: of the target.
        tokens: of the step.
        rows: the most whose logits are made at once.
        arriving: values that are there before the first call, see `moec.artifacts.sections.Section`.
        leaving: values that are read when the last call is over.
    """
    main = _Numbering(model, program, "main", tokens)
    for name in (*CHAIN_INPUTS, *arriving):
        main.own(name)
    if arriving:
        main.touch(arriving)
    main.run(0, model.last_step)
    if leaving:
        main.touch(leaving)
    crossing = crossing_values(model, arriving)
    last = _Numbering(model, program, "last", rows, main.clock)
    for name in crossing:
        last.own(name)
        last.use(name)
    last.clock += 1
    last.run(model.last_step, len(model.steps))
    if not leaving:
        last.use(CHAIN_OUTPUT)
    main.clock = last.clock
    for name in crossing:
        main.use(name)
    encoder = _Numbering(model, program, "encoder", tokens, last.clock + 1)
    for name in CHAIN_INPUTS:
        encoder.own(name)
    encoder.run(len(model.steps), len(model.all_steps))
    inputs = {ValueKey(part, name) for part in ("encoder", "main") for name in CHAIN_INPUTS}
    lives = {
        key: life for key, life in (main.lives | last.lives | encoder.lives).items() if key not in inputs
    }
    roots = main.roots | last.roots | encoder.roots
    return ChainLayout(tuple(Lifetime(key, *life) for key, life in lives.items()), roots)


def steps_of(model: ModelRecord, part: Part) -> range:
    """The numbers of a part's steps in ``model.all_steps``."""
    end = len(model.steps)
    return {
        "encoder": range(end, len(model.all_steps)),
        "main": range(model.last_step),
        "last": range(model.last_step, end),
    }[part]


def crossing_values(model: ModelRecord, arriving: Sequence[ValueId] = ()) -> list[ValueId]:
    """Values that steps before ``last_step`` make (or the chain's inputs, or ``arriving``) and later steps read."""
    known: set[ValueId] = {*CHAIN_INPUTS, *arriving}
    for step in model.steps[: model.last_step]:
        known.update(step_values(step)[1])
    crossing: dict[ValueId, None] = {}
    for step in model.steps[model.last_step :]:
        crossing.update(dict.fromkeys(name for name in step_values(step)[0] if name in known))
    return list(crossing)


def value_spec(model: ModelRecord, name: ValueId) -> TensorSpec:
    """Type and shape of a value of the chain, its inputs included."""
    return TensorSpec("int64", (1, "T")) if name in CHAIN_INPUTS else model.values[name]


def kernel_name(model: ModelRecord, step: Step) -> str:
    """The packed function that runs a step which is no segment."""
    if isinstance(step, AttentionStep):
        return f"attention_{step.attention}"
    if isinstance(step, AppendStep):
        return f"{APPEND}{step.attention}"
    if isinstance(step, SelectionStep):
        return f"{SELECTION_PREFIX}{step.selection}"
    if isinstance(step, StateStep):
        return f"{STATE_PREFIX}{step.state}"
    if isinstance(step, CapacityStep):
        return capacity_name(model.experts[step.layer])
    assert isinstance(step, ExpertsStep)
    return f"experts_{model.experts[step.layer].body}"


def beside_of(model: ModelRecord, program: ProgramRecord, number: int) -> Beside | None:
    """What runs the experts of step ``number`` together with the side segment before them."""
    step, side = model.all_steps[number], model.all_steps[number - 1]
    if isinstance(step, ExpertsStep) and isinstance(side, SegmentStep) and side.side:
        return program.beside_experts(model.experts[step.layer].body, side.function)
    return None


class _Numbering:
    """Numbers the calls of one part, and notes who is touched by which."""

    def __init__(
        self, model: ModelRecord, program: ProgramRecord, part: Part, count: int, clock: int = 0
    ) -> None:
        self.clock = clock
        self.roots: dict[ValueKey, ValueKey] = {}
        self.lives: dict[Key, tuple[int, int, int]] = {}
        """Bytes, first and last call."""
        self._model, self._program, self._part, self._count = model, program, part, count
        self._segments = {segment.name: segment for segment in program.segments}
        self._workspaces = {workspace.function: workspace for workspace in program.workspaces}

    def own(self, name: ValueId) -> None:
        """The value has memory of its own."""
        key = ValueKey(self._part, name)
        self.roots[key] = key

    def use(self, name: ValueId) -> None:
        """The call that comes next touches a value."""
        key = self.roots[ValueKey(self._part, name)]
        self._touch(key, value_spec(self._model, key.name))

    def touch(self, names: Sequence[ValueId]) -> None:
        """A call of its own touches values: they are copied."""
        for name in names:
            self.use(name)
        self.clock += 1

    def run(self, first: int, last: int) -> None:
        """Number the calls of the steps ``first .. last - 1``."""
        for number in range(first, last):
            step = self._model.all_steps[number]
            if isinstance(step, SegmentStep):
                self._segment(number, step, self._segments[step.function])
            else:
                reads, writes = step_values(step)
                for name in writes:
                    self.own(name)
                for name in (*reads, *writes):
                    self.use(name)
                self._workspace(kernel_name(self._model, step), WorkspaceKey(number, 0))
                if beside_of(self._model, self._program, number) is not None:
                    side = self._model.all_steps[number - 1]
                    assert isinstance(side, SegmentStep)
                    for call in self._segments[side.function].calls:
                        self._touch_call(number - 1, side, call)
                self.clock += 1

    def _segment(self, number: int, step: SegmentStep, segment: SegmentProgram) -> None:
        for name, place in zip(step.outputs, segment.outputs, strict=True):
            if place.source == "output" and step.outputs[place.number] == name:
                self.own(name)
        for name, place in zip(step.outputs, segment.outputs, strict=True):
            names = step.outputs if place.source == "output" else step.inputs
            self.roots[ValueKey(self._part, name)] = self.roots[ValueKey(self._part, names[place.number])]
        for which, call in enumerate(segment.calls):
            self._touch_call(number, step, call)
            self._workspace(call.function, WorkspaceKey(number, which))
            self.clock += 1

    def _touch_call(self, number: int, step: SegmentStep, call: Call) -> None:
        for operand in call.operands:
            if operand.source == "local":
                local = self._segments[step.function].locals[operand.number]
                self._touch(LocalKey(number, operand.number), local)
            elif operand.source != "weight":
                names = step.outputs if operand.source == "output" else step.inputs
                self.use(names[operand.number])

    def _workspace(self, function: str, key: WorkspaceKey) -> None:
        workspace = self._workspaces.get(function)
        if workspace is not None:
            self._extend(key, workspace.at(self._count))

    def _touch(self, key: Key, spec: TensorSpec | LocalSpec) -> None:
        self._extend(key, size_bytes(spec.dtype, spec.shape).at(self._count))

    def _extend(self, key: Key, size: int) -> None:
        _, first, _ = self.lives.get(key, (size, self.clock, self.clock))
        self.lives[key] = (size, first, self.clock)
