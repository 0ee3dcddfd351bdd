"""Runs steps of the engine through the chain, section by section."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.layout.footprint import LOGIT_ROWS
from moec.runtime.chain.gate import Gate
from moec.runtime.device import Move, view_bytes
from moec.runtime.engine.batch import choose_on_host

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from moec.runtime.chain.section import ChainSection
    from moec.runtime.device import Link
    from moec.runtime.engine.batch import StepBatch
    from moec.runtime.engine.sequence import Sequence as RunningSequence
    from moec.runtime.routing.recorder import RoutingRecorder
    from moec.runtime.stats import Stats


TOKEN_BYTES = 8


@dataclass(frozen=True)
class Links:
    """The ways between the devices that run the sections of a chain."""

    onward: tuple[Link, ...] = ()
    """From each section to the next."""
    back: tuple[tuple[ChainSection, Link], ...] = ()
    """From the last one, which chooses tokens, to each other one that reads them."""


class ChainExecutor:
    """Runs steps through the compiled chain. With its last reference its devices are closed, if nobody did it before.

    Args:
        sections: what runs it, in order; the last one chooses tokens.
        vocab_size: V.
        stats: what was done.
        links: between the sections.
    """

    def __init__(
        self, sections: Sequence[ChainSection], vocab_size: int, stats: Stats, links: Links | None = None
    ) -> None:
        self.sections = tuple(sections)
        self._last = self.sections[-1]
        self._links = links or Links()
        self._vocab_size, self._stats = vocab_size, stats
        self._recorder: RoutingRecorder | None = None
        self._chosen: list[RunningSequence] = []
        """Whose next tokens the device has, or will have after the step that it runs, in the order of the rows."""
        self._gate = Gate([section.device for section in self.sections])
        # What uses a device and what the device knows of it are a circle, which Python would look for some time later.
        self._finalizer = weakref.finalize(self, self._gate.close)

    @property
    def recorder(self) -> RoutingRecorder | None:
        """Gets every token's routing while set."""
        return self._recorder

    @recorder.setter
    def recorder(self, recorder: RoutingRecorder | None) -> None:
        self._recorder = recorder
        for section in self.sections:
            section.record_with(recorder)

    def count(self) -> None:
        """Bring the counters of experts up to date."""
        with self._gate:
            for section in self.sections:
                section.experts.count(self._stats)

    def close(self) -> None:
        """Let go of all memory."""
        self._finalizer()
        for section in self.sections:
            section.forget()

    def run(self, batch: StepBatch) -> NDArray[np.float32]:
        """See `moec.runtime.engine.batch.Executor`; the result is good until the next run."""
        with self._gate:
            return self._logits(batch)

    def _logits(self, batch: StepBatch) -> NDArray[np.float32]:
        self._show(batch)
        self._chosen = []
        if self.recorder is None and len(batch.wanted) == batch.count <= LOGIT_ROWS:
            self._run_whole(batch.count)
            return self._read_logits(batch.count, gathered=False)
        self._run_main(batch.count)
        if self.recorder is None:
            return self._logits_of(batch, batch.wanted)
        return self._logits_of(batch, list(range(batch.count)))[batch.wanted]

    def encode(self, batch: StepBatch) -> None:
        """See `moec.runtime.engine.batch.Executor`."""
        with self._gate:
            self._show(batch)
            self._chosen = []
            self._last.run_part("encoder", batch.count)

    def can_run_ahead(self, sequences: list[RunningSequence]) -> bool:
        """See `moec.runtime.engine.batch.Executor`."""
        if not sequences or sequences != self._chosen or not self._records(len(sequences)):
            return False
        sampler = self._last.sampler
        return sampler is not None and sampler.can_choose(sequences, ahead=1)

    def next_tokens(
        self, batch: StepBatch, sequences: list[RunningSequence], *, ahead: bool = False
    ) -> Callable[[], list[int]]:
        """See `moec.runtime.engine.batch.Executor`."""
        with self._gate:
            wait = self._begin(batch, sequences, ahead=ahead)

        def finish() -> list[int]:
            with self._gate:
                return wait()

        return finish

    def _begin(
        self, batch: StepBatch, sequences: list[RunningSequence], *, ahead: bool
    ) -> Callable[[], list[int]]:
        sampler, rows = self._last.sampler, len(sequences)
        if sampler is None or rows > LOGIT_ROWS or not sampler.can_choose(sequences, ahead=ahead):
            return self._choose(self._logits(batch), sequences)
        if self._recorder is not None and not (rows == batch.count and self._records(rows)):
            return self._choose(self._logits(batch), sequences)
        sampler.stage(sequences, ahead=ahead)
        self._show(batch, ahead=ahead)
        if ahead:
            self._hand_back(rows)
        if rows == batch.count:
            self._run_whole(rows, sampled=True)
        else:
            self._run_main(batch.count)
            if rows:
                self._last.gather(batch.wanted)
                self._last.run_part("last", rows, gathered=True, sampled=True)
        self._chosen = sequences
        record = self._read_routing(sequences)
        if not rows:
            return list
        tokens = sampler.read(sequences, self._last.tokens)
        marks = [section.device.mark() for section in self.sections[:-1]]

        def finish() -> list[int]:
            if record is not None:
                record()
            chosen = tokens()
            for finished in marks:
                finished()
            return chosen

        return finish

    def _run_whole(self, count: int, *, sampled: bool = False) -> None:
        for number, section in enumerate(self.sections):
            self._carry(number, count)
            section.run_whole(count, sampled=sampled)

    def _run_main(self, count: int) -> None:
        for number, section in enumerate(self.sections):
            self._carry(number, count)
            section.run_part("main", count)

    def _carry(self, number: int, count: int) -> None:
        """Bring a section what it reads of those before, and let it leave alone what the one behind has yet to read."""
        onward = self._links.onward
        if number:
            places = zip(
                self.sections[number - 1].leaving(count), self.sections[number].arriving(count), strict=True
            )
            onward[number - 1].carry(
                [Move(source.address, target.address, view_bytes(source)) for source, target in places]
            )
        if number < len(onward):
            onward[number].settle()

    def _hand_back(self, rows: int) -> None:
        """Bring the tokens that were chosen last to where the next step reads them."""
        for section, link in self._links.back:
            link.carry([Move(self._last.tokens, section.tokens, TOKEN_BYTES * rows)])

    def _records(self, rows: int) -> bool:
        """Whether the routing of a decoding step is either not wanted, or kept by the device."""
        return self._recorder is None or all(
            section.log is not None and rows <= section.log.tokens
            for section in self.sections
            if section.routes
        )

    def _read_routing(self, sequences: list[RunningSequence]) -> Callable[[], None] | None:
        """What tells the recorder of a decoding step, but for sequences that have ended since it was begun."""
        recorder = self._recorder
        logs = [section.log for section in self.sections if section.log is not None]
        if recorder is None or not logs:
            return None
        waits = [log.read(len(sequences)) for log in logs]

        def record() -> None:
            alive = [row for row, sequence in enumerate(sequences) if sequence.finished is None]
            for wait in waits:
                for layer, index, weight in wait():
                    recorder.record(layer, index[alive], weight[alive])

        return record

    def _choose(
        self, logits: NDArray[np.float32], sequences: list[RunningSequence]
    ) -> Callable[[], list[int]]:
        started = perf_counter()
        tokens = choose_on_host(logits, sequences)
        self._stats.milliseconds["sampling"] += (perf_counter() - started) * 1e3
        return lambda: tokens

    def _show(self, batch: StepBatch, *, ahead: bool = False) -> None:
        """Let the device see the step."""
        rows = batch.table.changed
        for section in self.sections:
            section.show(batch, rows, ahead=ahead)
        # Not before: where that was cut short, the next step shows them.
        batch.table.shown(rows)

    def _logits_of(self, batch: StepBatch, rows: list[int]) -> NDArray[np.float32]:
        """Run the last steps on ``rows`` and read their logits."""
        if len(rows) == batch.count <= LOGIT_ROWS:
            return self._run_last(batch.count, gathered=False)
        if 0 < len(rows) <= LOGIT_ROWS:
            self._last.gather(rows)
            return self._run_last(len(rows), gathered=True)
        logits = np.empty((len(rows), self._vocab_size), np.float32)
        for start in range(0, len(rows), LOGIT_ROWS):
            block = rows[start : start + LOGIT_ROWS]
            self._last.gather(block)
            logits[start : start + len(block)] = self._run_last(len(block), gathered=True)
        return logits

    def _run_last(self, rows: int, *, gathered: bool) -> NDArray[np.float32]:
        self._last.run_part("last", rows, gathered=gathered)
        return self._read_logits(rows, gathered=gathered)

    def _read_logits(self, rows: int, *, gathered: bool) -> NDArray[np.float32]:
        """The last section's, which has waited for all others."""
        logits = self._last.read_logits(rows, gathered=gathered)
        for section in self.sections[:-1]:
            section.device.mark()()
        return logits
