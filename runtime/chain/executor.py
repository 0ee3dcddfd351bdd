"""Runs steps of the engine through the chain, section by section."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.footprint import LOGIT_ROWS
from moec.runtime.device import closed_error
from moec.runtime.engine.batch import choose_on_host

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from moec.runtime.chain.section import ChainSection
    from moec.runtime.engine.batch import StepBatch
    from moec.runtime.engine.sequence import Sequence
    from moec.runtime.routing.recorder import RoutingRecorder
    from moec.runtime.stats import Stats


class ChainExecutor:
    """Runs steps through the compiled chain.

    Args:
        section: what runs it.
        vocab_size: V.
        stats: what was done.
    """

    def __init__(self, section: ChainSection, vocab_size: int, stats: Stats) -> None:
        self.section = section
        self._vocab_size, self._stats = vocab_size, stats
        self._recorder: RoutingRecorder | None = None
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
        self.section.record_with(recorder)

    def count(self) -> None:
        """Bring the counters of experts up to date."""
        self.section.experts.count(self._stats)

    def close(self) -> None:
        """Let go of all memory."""
        self._closed = True
        self.section.forget()
        self.section.device.close()

    def run(self, batch: StepBatch) -> NDArray[np.float32]:
        """See `moec.runtime.engine.batch.Executor`; the result is good until the next run."""
        self._show(batch)
        self._chosen = []
        if self.recorder is None and len(batch.wanted) == batch.count <= LOGIT_ROWS:
            self.section.run_whole(batch.count)
            return self.section.read_logits(batch.count, gathered=False)
        self.section.run_part("main", batch.count)
        if self.recorder is None:
            return self._logits_of(batch, batch.wanted)
        return self._logits_of(batch, list(range(batch.count)))[batch.wanted]

    def encode(self, batch: StepBatch) -> None:
        """See `moec.runtime.engine.batch.Executor`."""
        self._show(batch)
        self._chosen = []
        self.section.run_part("encoder", batch.count)

    def can_run_ahead(self, sequences: list[Sequence]) -> bool:
        """See `moec.runtime.engine.batch.Executor`."""
        if not sequences or sequences != self._chosen or not self._records(len(sequences)):
            return False
        sampler = self.section.sampler
        return sampler is not None and sampler.can_choose(sequences, ahead=1)

    def next_tokens(
        self, batch: StepBatch, sequences: list[Sequence], *, ahead: bool = False
    ) -> Callable[[], list[int]]:
        """See `moec.runtime.engine.batch.Executor`."""
        self._check_open()
        sampler, rows = self.section.sampler, len(sequences)
        if sampler is None or rows > LOGIT_ROWS or not sampler.can_choose(sequences, ahead=ahead):
            return self._choose(self.run(batch), sequences)
        if self._recorder is not None and not (rows == batch.count and self._records(rows)):
            return self._choose(self.run(batch), sequences)
        sampler.stage(sequences, ahead=ahead)
        self._show(batch, ahead=ahead)
        if rows == batch.count:
            self.section.run_whole(rows, sampled=True)
        else:
            self.section.run_part("main", batch.count)
            if rows:
                self.section.gather(batch.wanted)
                self.section.run_part("last", rows, gathered=True, sampled=True)
        self._chosen = sequences
        record = self._read_routing(sequences)
        tokens = sampler.read(sequences, self.section.tokens) if rows else list
        if record is None:
            return tokens

        def finish() -> list[int]:
            record()
            return tokens()

        return finish

    def _records(self, rows: int) -> bool:
        """Whether the routing of a decoding step is either not wanted, or kept by the device."""
        log = self.section.log
        return self._recorder is None or (log is not None and rows <= log.tokens)

    def _read_routing(self, sequences: list[Sequence]) -> Callable[[], None] | None:
        """What tells the recorder of a decoding step, but for sequences that have ended since it was begun."""
        recorder, log = self._recorder, self.section.log
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

    def _show(self, batch: StepBatch, *, ahead: bool = False) -> None:
        """Let the device see the step."""
        self._check_open()
        self.section.show(batch, batch.table.take_changed(), ahead=ahead)

    def _logits_of(self, batch: StepBatch, rows: list[int]) -> NDArray[np.float32]:
        """Run the last steps on ``rows`` and read their logits."""
        if len(rows) == batch.count <= LOGIT_ROWS:
            return self._run_last(batch.count, gathered=False)
        if 0 < len(rows) <= LOGIT_ROWS:
            self.section.gather(rows)
            return self._run_last(len(rows), gathered=True)
        logits = np.empty((len(rows), self._vocab_size), np.float32)
        for start in range(0, len(rows), LOGIT_ROWS):
            block = rows[start : start + LOGIT_ROWS]
            self.section.gather(block)
            logits[start : start + len(block)] = self._run_last(len(block), gathered=True)
        return logits

    def _run_last(self, rows: int, *, gathered: bool) -> NDArray[np.float32]:
        self.section.run_part("last", rows, gathered=gathered)
        return self.section.read_logits(rows, gathered=gathered)
