"""Runs steps of the engine through the chain: calls are bound once for each token count, then repeated."""

from __future__ import annotations

import math
from collections import OrderedDict
from time import perf_counter
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from moec.artifacts.chain import CHAIN_OUTPUT
from moec.artifacts.footprint import LOGIT_ROWS
from moec.artifacts.model import DTYPE_BYTES
from moec.runtime.chain.calls import part_calls
from moec.runtime.chain.layout import value_spec
from moec.runtime.chain.mirrors import BatchMirrors
from moec.runtime.device import closed_error
from moec.runtime.engine.batch import choose_on_host

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from moec.runtime.chain.binding import Binder
    from moec.runtime.chain.layout import Part
    from moec.runtime.device import Call, Device, TokenSampler
    from moec.runtime.engine.batch import StepBatch
    from moec.runtime.engine.sequence import Sequence
    from moec.runtime.experts.calls import ExpertCalls
    from moec.runtime.routing.recorder import RoutingLog, RoutingRecorder
    from moec.runtime.stats import Stats

COUNTS_KEPT = 96
"""Parts of steps, of one token count each, whose calls are kept; a decoding batch has only a few."""


class _Key(NamedTuple):
    """What a prepared list of calls is for."""

    part: Part | Literal["whole"]
    gathered: bool
    sampled: bool
    tokens: int


class ChainExecutor:
    """Runs steps through the compiled chain.

    Args:
        device: what runs the calls.
        binder: makes them.
        experts: what the binder makes the calls of routed experts with.
        stats: milliseconds per stage.
        sampler: chooses tokens on the device; ``None``: the host does, from the logits.
        log: keeps the routing of decoding steps on the device; ``None``: the host reads each layer's as it runs.
    """

    def __init__(
        self,
        device: Device,
        binder: Binder,
        experts: ExpertCalls,
        stats: Stats,
        sampler: TokenSampler | None = None,
        log: RoutingLog | None = None,
    ) -> None:
        self._device, self._binder, self._experts, self._stats = device, binder, experts, stats
        self._sampler, self._log = sampler, log
        self._recorder: RoutingRecorder | None = None
        self._model = binder.model
        self._mirrors: BatchMirrors | None = None
        self._bound: OrderedDict[_Key, Callable[[], None]] = OrderedDict()
        self._chosen: list[Sequence] = []
        """Whose next tokens the device has, or will have after the step that it runs, in the order of the rows."""
        self._closed = False

    @property
    def recorder(self) -> RoutingRecorder | None:
        """Gets every token's routing while set."""
        return self._recorder

    @recorder.setter
    def recorder(self, recorder: RoutingRecorder | None) -> None:
        self._recorder = recorder
        self._bound.clear()

    def count(self) -> None:
        """Bring the counters of experts up to date."""
        self._experts.count(self._stats)

    def close(self) -> None:
        """Let go of all memory."""
        self._closed = True
        self._bound.clear()
        self._device.close()

    def run(self, batch: StepBatch) -> NDArray[np.float32]:
        """See `moec.runtime.engine.batch.Executor`; the result is good until the next run."""
        self._check_open()
        mirrors = self._show(batch)
        self._chosen = []
        if self.recorder is None and len(batch.wanted) == batch.count <= LOGIT_ROWS:
            self._whole(batch.count, mirrors)()
            return self._read_logits(mirrors, batch.count, gathered=False)
        self._part("main", batch.count, mirrors)()
        if self.recorder is None:
            return self._logits_of(mirrors, batch.wanted)
        return self._logits_of(mirrors, list(range(batch.count)))[batch.wanted]

    def encode(self, batch: StepBatch) -> None:
        """See `moec.runtime.engine.batch.Executor`."""
        self._check_open()
        self._chosen = []
        self._part("encoder", batch.count, self._show(batch))()

    def can_run_ahead(self, sequences: list[Sequence]) -> bool:
        """See `moec.runtime.engine.batch.Executor`."""
        if not sequences or sequences != self._chosen or not self._records(len(sequences)):
            return False
        return self._sampler is not None and self._sampler.can_choose(sequences, ahead=1)

    def next_tokens(
        self, batch: StepBatch, sequences: list[Sequence], *, ahead: bool = False
    ) -> Callable[[], list[int]]:
        """See `moec.runtime.engine.batch.Executor`."""
        self._check_open()
        sampler, rows = self._sampler, len(sequences)
        if sampler is None or rows > LOGIT_ROWS or not sampler.can_choose(sequences, ahead=ahead):
            return self._choose(self.run(batch), sequences)
        if self._recorder is not None and not (rows == batch.count and self._records(rows)):
            return self._choose(self.run(batch), sequences)
        sampler.stage(sequences, ahead=ahead)
        mirrors = self._show(batch, ahead=ahead)
        if rows == batch.count:
            self._whole(rows, mirrors, sampled=True)()
        else:
            self._part("main", batch.count, mirrors)()
            if rows:
                self._gather(mirrors, batch.wanted)
                self._part("last", rows, mirrors, gathered=True, sampled=True)()
        self._chosen = sequences
        record = self._read_routing(sequences)
        tokens = sampler.read(sequences, mirrors.tokens) if rows else list
        if record is None:
            return tokens

        def finish() -> list[int]:
            record()
            return tokens()

        return finish

    def _records(self, rows: int) -> bool:
        """Whether the routing of a decoding step is either not wanted, or kept by the device."""
        return self._recorder is None or (self._log is not None and rows <= self._log.tokens)

    def _read_routing(self, sequences: list[Sequence]) -> Callable[[], None] | None:
        """What tells the recorder of a decoding step, but for sequences that have ended since it was begun."""
        recorder, log = self._recorder, self._log
        if recorder is None or log is None:
            return None
        wait = log.read(len(sequences))

        def record() -> None:
            alive = [row for row, sequence in enumerate(sequences) if sequence.finished is None]
            for layer, index, weight in wait():
                recorder.record(layer, index[alive], weight[alive])

        return record

    def _check_open(self) -> None:
        """Nothing may be written to memory that was given back, where an engine outlives its model."""
        if self._closed:
            raise closed_error()

    def _choose(self, logits: NDArray[np.float32], sequences: list[Sequence]) -> Callable[[], list[int]]:
        started = perf_counter()
        tokens = choose_on_host(logits, sequences)
        self._stats.milliseconds["sampling"] += (perf_counter() - started) * 1e3
        return lambda: tokens

    def _show(self, batch: StepBatch, *, ahead: bool = False) -> BatchMirrors:
        """Let the device see the step."""
        mirrors = self._mirrors
        if mirrors is None or mirrors.batch is not batch:
            mirrors = self._mirrors = BatchMirrors(self._device, batch)
            self._bound.clear()
        mirrors.update(ahead=ahead)
        return mirrors

    def _whole(self, count: int, mirrors: BatchMirrors, *, sampled: bool = False) -> Callable[[], None]:
        """A step whose every row's logits are wanted, as decoding has: both parts as one list of calls."""
        key = _Key("whole", False, sampled, count)
        return self._bound_calls(
            key, lambda: self._calls("main", key, mirrors) + self._last_calls(key, mirrors)
        )

    def _part(
        self,
        part: Part,
        count: int,
        mirrors: BatchMirrors,
        *,
        gathered: bool = False,
        sampled: bool = False,
    ) -> Callable[[], None]:
        key = _Key(part, gathered, sampled, count)
        last = part == "last"
        return self._bound_calls(
            key, lambda: self._last_calls(key, mirrors) if last else self._calls(part, key, mirrors)
        )

    def _calls(self, part: Part, key: _Key, mirrors: BatchMirrors) -> list[Call]:
        """The calls of a part, with its routing kept where it is wanted: by the device, or read by the host."""
        logged = self._recorder is not None and self._log is not None and key.part == "whole" and key.sampled
        return part_calls(
            self._binder,
            part,
            key.tokens,
            mirrors,
            gathered=key.gathered,
            recorder=None if logged else self._recorder,
            places=self._log.places(key.tokens) if logged and self._log is not None else None,
        )

    def _last_calls(self, key: _Key, mirrors: BatchMirrors) -> list[Call]:
        """The last part's calls, and where the device chooses tokens the call that does."""
        calls = self._calls("last", key, mirrors)
        if key.sampled:
            assert self._sampler is not None
            logits = self._binder.value("last", CHAIN_OUTPUT, key.tokens, mirrors, gathered=key.gathered)
            calls.append(self._sampler.call(logits, mirrors.tokens))
        return calls

    def _bound_calls(self, key: _Key, make: Callable[[], list[Call]]) -> Callable[[], None]:
        """The prepared calls for ``key``; of those kept the longest unused go first."""
        run = self._bound.get(key)
        if run is None:
            calls = make()
            if len(self._bound) >= COUNTS_KEPT:
                self._bound.popitem(last=False)
            run = self._bound[key] = self._device.prepare(calls, self._stats, often=key.part == "whole")
        self._bound.move_to_end(key)
        return run

    def _logits_of(self, mirrors: BatchMirrors, rows: list[int]) -> NDArray[np.float32]:
        """Run the last steps on ``rows`` and read their logits."""
        count = mirrors.batch.count
        if len(rows) == count <= LOGIT_ROWS:
            return self._run_last(mirrors, count, gathered=False)
        if 0 < len(rows) <= LOGIT_ROWS:
            self._gather(mirrors, rows)
            return self._run_last(mirrors, len(rows), gathered=True)
        logits = np.empty((len(rows), self._model.vocab_size), np.float32)
        for start in range(0, len(rows), LOGIT_ROWS):
            block = rows[start : start + LOGIT_ROWS]
            self._gather(mirrors, block)
            logits[start : start + len(block)] = self._run_last(mirrors, len(block), gathered=True)
        return logits

    def _run_last(self, mirrors: BatchMirrors, rows: int, *, gathered: bool) -> NDArray[np.float32]:
        self._part("last", rows, mirrors, gathered=gathered)()
        return self._read_logits(mirrors, rows, gathered=gathered)

    def _read_logits(self, mirrors: BatchMirrors, rows: int, *, gathered: bool) -> NDArray[np.float32]:
        place = self._binder.value("last", CHAIN_OUTPUT, rows, mirrors, gathered=gathered)
        logits: NDArray[np.float32] = self._device.read(place).reshape(rows, self._model.vocab_size)
        return logits

    def _gather(self, mirrors: BatchMirrors, rows: list[int]) -> None:
        """Copy ``rows`` of the values that the last steps read to where those look for them."""
        for name in self._binder.crossing:
            spec = value_spec(self._model, name)
            source = self._binder.value("main", name, mirrors.batch.count, mirrors)
            target = self._binder.value("last", name, len(rows), mirrors, gathered=True)
            axis = spec.shape.index("T")
            row_bytes = DTYPE_BYTES[spec.dtype] * math.prod(source.shape[axis + 1 :])
            for block in range(math.prod(source.shape[:axis])):
                begin = source.address + block * mirrors.batch.count * row_bytes
                self._device.gather(begin, target.address + block * len(rows) * row_bytes, rows, row_bytes)
