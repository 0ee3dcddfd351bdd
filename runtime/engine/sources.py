"""Running a model's encoder: its sources, of sequences that join or are scored, into their part of the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.runtime.engine.batch import Piece

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.runtime.engine.batch import Executor, StepBatch
    from moec.runtime.engine.pages import Lease
    from moec.runtime.engine.scheduler import Scheduler, StepPlan
    from moec.runtime.engine.sequence import Sequence
    from moec.runtime.stats import Stats


class SourceReader:
    """Has the encoder read sources.

    Args:
        executor: runs the encoder.
        batch: of the engine; a run of the encoder fills it with its own tokens.
        scheduler: knows the rows of the page table.
        stats: what was done.
    """

    def __init__(self, executor: Executor, batch: StepBatch, scheduler: Scheduler, stats: Stats) -> None:
        self._executor, self._batch, self._scheduler, self._stats = executor, batch, scheduler, stats
        self.observer: Callable[[list[Sequence]], None] | None = None
        """Told of each run of the encoder whose sources it read: none where it was for `read_alone`, or failed."""

    def read_joining(self, plan: StepPlan) -> None:
        """Read what sequences that join want read, as many sources at once as a step holds."""
        pieces: list[tuple[Sequence, Lease, Piece]] = []
        for chunk in plan.chunks:
            lease = chunk.sequence.lease
            if lease is None or lease.encoded:
                continue
            piece = self._piece(chunk.sequence.request.source, lease.row)
            if sum(len(each.tokens) for *_, each in pieces) + len(piece.tokens) > self._batch.capacity:
                self._read_together(pieces)
                pieces = []
            pieces.append((chunk.sequence, lease, piece))
        self._read_together(pieces)

    def read_alone(self, source: tuple[int, ...], row: int) -> None:
        """Read the source of no sequence, for the row ``row`` of the page table."""
        self._run([self._piece(source, row)], [])

    def _read_together(self, pieces: list[tuple[Sequence, Lease, Piece]]) -> None:
        if pieces:
            self._run([piece for *_, piece in pieces], [sequence for sequence, *_ in pieces])
        for _, lease, _ in pieces:
            lease.encoded = True

    def _run(self, pieces: list[Piece], sequences: list[Sequence]) -> None:
        """Read sources, of ``sequences`` where they are of any."""
        self._batch.fill(pieces, [])
        ran: list[Sequence] = []
        try:
            self._executor.encode(self._batch)
            ran = sequences
        finally:
            if self.observer is not None:
                self.observer(ran)
        self._stats.prompt_tokens += self._batch.count

    def _piece(self, source: tuple[int, ...], row: int) -> Piece:
        own = self._scheduler.source_row(row)
        return Piece(own, 0, list(source), own, len(source), len(source))
