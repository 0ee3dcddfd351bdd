"""The routing of a decoding step, kept on the GPU by the step itself and brought to the host in one copy behind it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moec.artifacts.model import DTYPE_BYTES
from moec.artifacts.program import resolve
from moec.artifacts.steps import ExpertsStep
from moec.runtime.chain.layout import value_spec
from moec.runtime.device import View, padded_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from moec.artifacts.ids import ValueId
    from moec.artifacts.model import ModelRecord
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.routing.recorder import Routing


class DeviceRoutingLog:
    """See `moec.runtime.routing.recorder.RoutingLog`.

    The kernels that choose experts write here instead of into the arena, where later layers would take their place: a
    step that is logged has nothing more to do.

    Args:
        device: the GPU.
        model: its MoE layers.
        tokens: the most of a step.
        before: MoE layers that other devices run before these.

    Raises:
        BudgetError: there is no memory for it.
    """

    def __init__(self, device: CudaDevice, model: ModelRecord, tokens: int, before: int = 0) -> None:
        self.tokens = tokens
        self._model, self._before = model, before
        self._memory = device.allocate(routing_bytes(model, tokens))
        self._results = device.results(self._memory.size_bytes)

    def places(self, count: int) -> dict[ValueId, int]:
        """See `moec.runtime.routing.recorder.RoutingLog.places`."""
        first = self._memory.address
        return {name: first + offset for name, offset in _offsets(self._model, count).items()}

    def read(self, count: int) -> Callable[[], list[Routing]]:
        """See `moec.runtime.routing.recorder.RoutingLog.read`."""
        offsets, model = _offsets(self._model, count), self._model
        size = routing_bytes(model, count)
        wait = self._results.begin(View(self._memory.address, "uint8", (size,)))

        def finish() -> list[Routing]:
            copy = wait()

            def value(name: ValueId) -> Any:
                spec = value_spec(model, name)
                shape = resolve(spec.shape, count)
                return copy[offsets[name] :].view(spec.dtype)[: math.prod(shape)].reshape(shape)

            return [
                (self._before + step.layer, value(step.index), value(step.weight)) for step in _routed(model)
            ]

        return finish


def routing_bytes(model: ModelRecord, tokens: int) -> int:
    """Device memory of a log of steps of so many tokens."""
    return sum(_room(model, name, tokens) for name in _names(model))


def _offsets(model: ModelRecord, count: int) -> dict[ValueId, int]:
    """Where the values of a step of ``count`` tokens lie, so that they are one run of bytes."""
    offsets: dict[ValueId, int] = {}
    total = 0
    for name in _names(model):
        offsets[name] = total
        total += _room(model, name, count)
    return offsets


def _room(model: ModelRecord, name: ValueId, count: int) -> int:
    spec = value_spec(model, name)
    return padded_bytes(DTYPE_BYTES[spec.dtype] * math.prod(resolve(spec.shape, count)))


def _names(model: ModelRecord) -> dict[ValueId, None]:
    return dict.fromkeys(name for step in _routed(model) for name in (step.index, step.weight))


def _routed(model: ModelRecord) -> Iterable[ExpertsStep]:
    return [step for step in model.steps if isinstance(step, ExpertsStep)]
