"""The calls of one part of a step for one count of tokens: each step's arguments in the order of its kernel's.

For each token count the same calls come with tensors of other shapes at the same addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.artifacts.program import resolve
from moec.artifacts.steps import (
    AppendStep,
    AttentionStep,
    CapacityStep,
    SegmentStep,
    SelectionStep,
    StateStep,
)
from moec.runtime.chain.layout import LocalKey, kernel_name, steps_of
from moec.runtime.device import HostCall, PackedCall, View
from moec.runtime.experts.calls import ExpertWork

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moec.artifacts.ids import TensorName, ValueId
    from moec.artifacts.program import Operand
    from moec.artifacts.steps import ExpertsStep, Step
    from moec.runtime.chain.binding import AttentionKind, Binder
    from moec.runtime.chain.layout import Part
    from moec.runtime.chain.mirrors import BatchMirrors
    from moec.runtime.device import Call
    from moec.runtime.routing.recorder import RoutingRecorder


_TOLD: dict[AttentionKind, tuple[str, ...]] = {
    "causal": ("token_sequence", "token_position"),
    "whole": ("token_sequence", "token_position", "token_last"),
    "cross": ("token_source", "token_last"),
}
"""What an attention kernel is told of each token, in the order of its arguments."""


def part_calls(
    binder: Binder,
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
        binder: has the functions and tensors.
        part: ``main``, ``last`` for the steps from ``last_step`` on, or ``encoder``.
        count: tokens, or in the last part rows.
        mirrors: the step's batch.
        gathered: whether values that cross into the last part have been copied there, row by row.
        recorder: gets every layer's routing from the host, which has a part in the calls then.
        places: addresses of values that are to lie elsewhere than in the arena.
    """
    steps = binder.model.all_steps
    binding = _PartBinding(binder, part, count, mirrors, gathered, recorder, binder.rooted(places or {}))
    return [call for number in steps_of(binder.model, part) for call in binding.step(number, steps[number])]


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
        """The calls of step ``number`` of the model, none where another step's kernel does its work."""
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
        work = ExpertWork(step.layer, binder.function(name), views, extra, beside)
        calls = binder.experts().calls(work)
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
