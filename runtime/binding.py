"""From the records and a loaded target to an executor: every name is looked up here, once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.artifacts.checks import CHAIN_INPUTS, CHAIN_OUTPUT, step_values
from moec.artifacts.model import AttentionStep, SegmentStep
from moec.runtime.executor import ChainExecutor, crossing_values
from moec.runtime.steps import Allocator, AttentionCall, ExpertsCall, SegmentCall
from moec.runtime.tensors import tensor_at

if TYPE_CHECKING:
    from moec.artifacts.ids import TensorName, ValueId
    from moec.artifacts.model import ExpertsStep, ModelRecord
    from moec.artifacts.reader import Bundle
    from moec.runtime.cache.storage import CacheStorage
    from moec.runtime.experts import ExpertStore
    from moec.runtime.libraries import Functions
    from moec.runtime.stats import Stats
    from moec.runtime.steps import Call


def bind(
    bundle: Bundle, functions: Functions, cache: CacheStorage, experts: ExpertStore, stats: Stats
) -> ChainExecutor:
    """Bind the chain of ``bundle``.

    Raises:
        BundleError: a function is missing in the module.
    """
    model = bundle.model
    slots = value_slots(model)
    allocator = Allocator()
    binder = _Binder(bundle, functions, cache, experts, slots, allocator)
    freed = last_uses(model)
    calls = [
        binder.call(step, [slots[name] for name in names])
        for step, names in zip(model.steps, freed, strict=True)
    ]
    return ChainExecutor(model, calls, slots, allocator, (bundle, cache, experts), stats)


def value_slots(model: ModelRecord) -> dict[ValueId, int]:
    """A number for each value: the chain's inputs first, then in the order in which steps make them."""
    names = list(CHAIN_INPUTS)
    for step in model.steps:
        names += step_values(step)[1]
    return {name: number for number, name in enumerate(names)}


def last_uses(model: ModelRecord) -> list[list[ValueId]]:
    """For each step, the values that nothing needs after it.

    Values that cross ``last_step`` are kept to the end of the step: the rows wanted are gathered from them.
    """
    kept = {*CHAIN_INPUTS, CHAIN_OUTPUT, *crossing_values(model)}
    freed: list[list[ValueId]] = [[] for _ in model.steps]
    last: dict[ValueId, int] = {}
    for number, step in enumerate(model.steps):
        reads, writes = step_values(step)
        last.update(dict.fromkeys((*reads, *writes), number))
    for name, number in last.items():
        if name not in kept:
            freed[number].append(name)
    return freed


class _Binder:
    def __init__(
        self,
        bundle: Bundle,
        functions: Functions,
        cache: CacheStorage,
        experts: ExpertStore,
        slots: dict[ValueId, int],
        allocator: Allocator,
    ) -> None:
        self._bundle = bundle
        self._functions = functions
        self._cache = cache
        self._experts = experts
        self._slots = slots
        self._allocator = allocator
        self._weights: dict[TensorName, Any] = {}

    def call(self, step: SegmentStep | AttentionStep | ExpertsStep, freed: list[int]) -> Call:
        if isinstance(step, SegmentStep):
            inputs, outputs = self._places(step.inputs), self._places(step.outputs)
            weights = [self._weight(name) for name in step.weights]
            function = self._functions.get(step.function)
            return SegmentCall(function, inputs, weights, outputs, self._allocator.item, freed)
        if isinstance(step, AttentionStep):
            return self._attention(step, freed)
        return self._experts_call(step, freed)

    def _attention(self, step: AttentionStep, freed: list[int]) -> AttentionCall:
        return AttentionCall(
            self._functions.get(f"cache_append_{step.attention}"),
            self._functions.get(f"attention_{step.attention}"),
            self._cache.layer(step.layer),
            self._slots[step.query],
            self._places((step.key,) if step.value is None else (step.key, step.value)),
            () if step.sinks is None else (self._weight(step.sinks),),
            self._slots[step.output],
            self._bundle.model.values[step.output],
            self._allocator,
            freed,
        )

    def _experts_call(self, step: ExpertsStep, freed: list[int]) -> ExpertsCall:
        values = self._bundle.model.values
        hidden, index, weight, output = step.hidden, step.index, step.weight, step.output
        return ExpertsCall(
            self._functions.get(f"experts_{self._bundle.model.experts[step.layer].body}"),
            step.layer,
            self._experts,
            (self._slots[hidden], self._slots[index], self._slots[weight], self._slots[output]),
            (values[hidden], values[index], values[weight], values[output]),
            self._allocator,
            freed,
        )

    def _places(self, names: tuple[ValueId, ...]) -> list[int]:
        return [self._slots[name] for name in names]

    def _weight(self, name: TensorName) -> Any:
        """A view of a dense weight in the mapped file, made once however often it is used."""
        if name not in self._weights:
            place = self._bundle.dense[name]
            address = self._bundle.dense_view(name).ctypes.data
            self._weights[name] = tensor_at(address, place.dtype, place.shape)
        return self._weights[name]
