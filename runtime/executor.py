"""The chain of ``model.json`` bound to compiled functions once, then run for each step of the engine."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from moec.artifacts.checks import CHAIN_INPUTS, CHAIN_OUTPUT, step_values
from moec.artifacts.footprint import LOGIT_ROWS
from moec.artifacts.model import TensorSpec
from moec.runtime.steps import Allocator, AttentionCall, Frame
from moec.runtime.tensors import tensor_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.artifacts.ids import ValueId
    from moec.artifacts.model import ModelRecord
    from moec.runtime.engine.batch import StepBatch
    from moec.runtime.routing import RoutingRecorder
    from moec.runtime.stats import Stats
    from moec.runtime.steps import Call

_VIEWS_KEPT = 64
"""Token counts whose input views are kept; a decoding batch has only a few."""


class ChainExecutor:
    """Runs steps through the compiled chain.

    Args:
        model: the chain.
        calls: one bound call for each step of the chain.
        slots: the place of each value in a frame.
        allocator: shared with the calls.
        memory: whatever owns the memory that the calls' tensors look at; kept alive with the executor.
        stats: milliseconds per stage.
    """

    def __init__(
        self,
        model: ModelRecord,
        calls: list[Call],
        slots: dict[ValueId, int],
        allocator: Allocator,
        memory: tuple[object, ...],
        stats: Stats,
    ) -> None:
        self._memory = memory
        self._model = model
        self._slots = slots
        self._allocator = allocator
        self._stats = stats
        self._main, self._last = calls[: model.last_step], calls[model.last_step :]
        assert not any(isinstance(call, AttentionCall) for call in self._last)
        self._crossing = [(slots[name], _spec(model, name)) for name in crossing_values(model)]
        self._inputs: dict[int, tuple[Any, ...]] = {}
        self._bound: StepBatch | None = None
        self._page_table: Any = None
        self.recorder: RoutingRecorder | None = None
        """Gets every token's routing while set."""

    def run(self, batch: StepBatch) -> NDArray[np.float32]:
        """See `moec.runtime.engine.batch.Executor`."""
        frame = self._frame(batch)
        self._run_calls(self._main, frame)
        if self.recorder is None:
            return self._logits_of(frame, batch.wanted)
        logits = self._logits_of(frame, list(range(batch.count)))
        return logits[batch.wanted]

    def _frame(self, batch: StepBatch) -> Frame:
        if batch is not self._bound:
            self._bound = batch
            self._page_table = tensor_of(batch.page_table)
            self._inputs.clear()
        count = batch.count
        inputs = self._inputs.get(count)
        if inputs is None:
            if len(self._inputs) >= _VIEWS_KEPT:
                self._inputs.clear()
            inputs = self._inputs[count] = (
                tensor_of(batch.tokens[:count].reshape(1, count)),
                tensor_of(batch.positions[:count].reshape(1, count)),
                tensor_of(batch.token_sequence[:count]),
                tensor_of(batch.token_position[:count]),
            )
        values: list[Any] = [None] * len(self._slots)
        values[0], values[1] = inputs[0], inputs[1]
        return Frame(values, count, self._page_table, inputs[2], inputs[3], self.recorder)

    def _run_calls(self, calls: list[Call], frame: Frame) -> None:
        milliseconds = self._stats.milliseconds
        before = perf_counter()
        for call in calls:
            call.run(frame)
            after = perf_counter()
            milliseconds[call.stage] += (after - before) * 1e3
            before = after

    def _logits_of(self, frame: Frame, rows: list[int]) -> NDArray[np.float32]:
        """Run the last steps on ``rows`` and read their logits."""
        if not rows:
            return np.empty((0, self._model.vocab_size), np.float32)
        if len(rows) == frame.count <= LOGIT_ROWS:
            return self._run_last(frame)
        blocks = [rows[start : start + LOGIT_ROWS] for start in range(0, len(rows), LOGIT_ROWS)]
        results = [self._run_last(self._gather(frame, block)) for block in blocks]
        return results[0] if len(results) == 1 else np.concatenate(results)

    def _run_last(self, frame: Frame) -> NDArray[np.float32]:
        self._run_calls(self._last, frame)
        logits = np.from_dlpack(frame.values[self._slots[CHAIN_OUTPUT]])
        return cast("NDArray[np.float32]", logits.reshape(frame.count, self._model.vocab_size))

    def _gather(self, frame: Frame, rows: list[int]) -> Frame:
        """A frame that has only ``rows`` of the values that the last steps read."""
        values: list[Any] = [None] * len(frame.values)
        for slot, spec in self._crossing:
            tensor = self._allocator.empty(spec, len(rows))
            source, target = np.from_dlpack(frame.values[slot]), np.from_dlpack(tensor)
            np.take(source, rows, axis=spec.shape.index("T"), out=target, mode="clip")
            values[slot] = tensor
        return Frame(values, len(rows), None, None, None, frame.recorder)


def crossing_values(model: ModelRecord) -> list[ValueId]:
    """Values that steps before ``last_step`` make (or the chain's inputs) and later steps read."""
    known: set[ValueId] = set(CHAIN_INPUTS)
    for step in model.steps[: model.last_step]:
        known.update(step_values(step)[1])
    crossing: dict[ValueId, None] = {}
    for step in model.steps[model.last_step :]:
        crossing.update(dict.fromkeys(name for name in step_values(step)[0] if name in known))
    return list(crossing)


def _spec(model: ModelRecord, name: ValueId) -> TensorSpec:
    return TensorSpec("int64", (1, "T")) if name in CHAIN_INPUTS else model.values[name]
