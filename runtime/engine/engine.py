"""The engine: `add` sequences, `step` them. `Model.generate` is a loop over it, and so is a server."""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.layout.footprint import LOGIT_ROWS
from moec.runtime.engine.admission import check_request
from moec.runtime.engine.batch import Executor, Piece, StepBatch
from moec.runtime.engine.pages import pages_for
from moec.runtime.engine.scheduler import Chunk, Limits, Scheduler, StepPlan
from moec.runtime.engine.sequence import Request, Sequence, TokenOutput
from moec.runtime.engine.sources import SourceReader
from moec.runtime.logprobs import token_logprobs
from moec.runtime.requests.checks import cache_too_small, check_count

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from numpy.typing import NDArray

    from moec.runtime.logprobs import TokenLogprobs
    from moec.runtime.requests.vocabulary import Vocabulary
    from moec.runtime.stats import Stats

NOTHING = StepPlan((), ())
"""A run through the model that advanced no sequence."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """A step that runs or has run; ``tokens`` waits for those of ``sequences``."""

    plan: StepPlan
    sequences: list[Sequence]
    tokens: Callable[[], list[int]]

    def chunks(self) -> list[Chunk]:
        """Those of sequences that have not ended since it was begun."""
        return [chunk for chunk in self.plan.chunks if chunk.sequence.finished is None]


class Engine:
    """Runs sequences of different lengths together, one step at a time.

    Not thread safe, and made for one driver: whoever calls `step` gets the tokens of all sequences.

    Where the executor can, the step after the next one is begun before the tokens of the next one are known, so that a
    GPU need not wait for the host. What such a step computes for a sequence that has ended meanwhile is dropped. Its
    pages are free at once all the same: the executor does steps in order, so nobody writes to them before.
    """

    def __init__(self, executor: Executor, limits: Limits, vocabulary: Vocabulary, stats: Stats) -> None:
        self.limits = limits
        self.stats = stats
        self._executor = executor
        self._vocabulary = vocabulary
        self.scheduler = Scheduler(limits)
        self._batch = StepBatch(limits.max_step_tokens, self.scheduler.table, sources=limits.sources)
        self.sources = SourceReader(executor, self._batch, self.scheduler, stats)
        """Runs the encoder, where there is one."""
        self._next_id = 0
        self._ahead: _Begun | None = None
        """The step that was begun ahead; its tokens are next."""
        self.observer: Callable[[StepPlan], None] | None = None
        """Told of each run through the model which tokens it was for, once those that it chooses are there: none
        where it was for `score`, or failed."""

    def add(self, request: Request) -> Sequence:
        """Queue a request; its sequence joins the batch at a coming `step`.

        Raises:
            RequestError: a token id is none of the model's, the prompt is empty, or the request can never fit.
        """
        check_count("max_new_tokens", request.max_new_tokens, least=1)
        check_request(self.limits, self._vocabulary, request.prompt, request.source, request.max_new_tokens)
        ends = self._vocabulary.known(request.eos_token_ids)
        sequence = Sequence(self._next_id, replace(request, eos_token_ids=ends))
        self._next_id += 1
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence at once; its pages are free. Does nothing where it has finished."""
        if sequence.finished is None:
            self.scheduler.remove(sequence)
            sequence.finished = "cancelled"

    @property
    def busy(self) -> bool:
        """Whether a sequence is running or waiting."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def capacity_tokens(self, source: int = 0) -> int:
        """Tokens that the longest possible sequence has, with so many of a source; bounded by context and cache.

        The last token of a sequence never enters the cache.
        """
        pages = self.limits.cache_pages - pages_for(source)
        return min(self.limits.max_context, pages * PAGE_TOKENS + 1)

    def step(self) -> list[TokenOutput]:
        """Run one step of all sequences that there is room for; the new tokens, oldest sequence first.

        A step that only fills caches returns an empty list; so does a step with nothing to do (see `busy`).
        """
        try:
            return self._step()
        except BaseException:
            self._observe(NOTHING)
            # Nothing is known of the steps under way, and a state cannot be advanced twice.
            self.scheduler.restart()
            raise

    def _step(self) -> list[TokenOutput]:
        current, self._ahead = self._ahead, None
        if current is None or not current.chunks():
            current = self._begin(None)
        if current is None:
            return []
        ahead = self._begin(current) if self._executor.can_run_ahead(current.sequences) else None
        outputs = self._collect(current)
        # Not before: where waiting failed, nothing is known of either step.
        self._ahead = ahead
        return outputs

    def _begin(self, last: _Begun | None) -> _Begun | None:
        """Let the executor begin the next step, after ``last`` where that still runs; ``None``: there is none."""
        started = perf_counter()
        plan = self.scheduler.schedule() if last is None else self.scheduler.follow(last.plan)
        encoding = perf_counter()
        if plan is not None and self.limits.sources:
            self.sources.read_joining(plan)
        encoded = perf_counter()
        sequences = [] if plan is None else self._fill(plan)
        self.stats.milliseconds["schedule"] += (perf_counter() - encoded + encoding - started) * 1e3
        if plan is None or not plan.chunks:
            return None
        return _Begun(
            plan, sequences, self._executor.next_tokens(self._batch, sequences, ahead=last is not None)
        )

    def score(self, tokens: tuple[int, ...], source: tuple[int, ...] = ()) -> NDArray[np.float32]:
        """Logits float32 ``[T, V]`` of one sequence at all its positions; running sequences are left alone.

        Args:
            tokens: of the sequence.
            source: what an encoder reads.

        Raises:
            RequestError: a token id is none of the model's, or running sequences hold too much of the cache.
        """
        logits = np.empty((len(tokens), self._vocabulary.size), np.float32)
        for start, rows in self._scored(tokens, source):
            logits[start : start + len(rows)] = rows
        return logits

    def score_tokens(self, tokens: tuple[int, ...], top: int) -> Generator[list[TokenLogprobs]]:
        """How likely each token of a decoder's sequence was after those before it, the second one first.

        They come in parts; `step` may be called between them, but nothing else of this kind.

        Args:
            tokens: of the sequence.
            top: how many of the likeliest tokens are named at each place.

        Raises:
            RequestError: as for `score`, with the first part.
        """
        for start, rows in self._scored(tokens, ()):
            following = tokens[start + 1 : start + 1 + len(rows)]
            yield [token_logprobs(row, token, top) for row, token in zip(rows, following, strict=False)]

    def _scored(
        self, tokens: tuple[int, ...], source: tuple[int, ...]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Runs of positions, by their first one, and their logits, which are good until the next run."""
        check_request(self.limits, self._vocabulary, tokens, source, 0)
        scheduler = self.scheduler
        needed = pages_for(len(tokens)) + pages_for(len(source))
        pages = scheduler.pages.allocate(needed)
        if pages is None:
            raise cache_too_small(needed, scheduler.pages.free)
        try:
            own = pages_for(len(tokens))
            scheduler.table.assign(scheduler.spare_row, 0, pages[:own])
            if source:
                scheduler.table.assign(scheduler.source_row(scheduler.spare_row), 0, pages[own:])
                self.sources.read_alone(source, scheduler.spare_row)
            yield from self._score_chunks(tokens, len(source))
        finally:
            scheduler.pages.release(pages)

    def _score_chunks(
        self, tokens: tuple[int, ...], source: int
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        batch, row = self._batch, self.scheduler.spare_row
        # All rows' logits are wanted, so no more tokens than the rows that memory was set aside for.
        count = len(tokens) if self.limits.whole_prompts else min(batch.capacity, LOGIT_ROWS)
        for start in range(0, len(tokens), count):
            chunk = list(tokens[start : start + count])
            piece = Piece(row, start, chunk, *self._source(row, source), len(tokens))
            batch.fill([piece], list(range(len(chunk))))
            try:
                logits = self._executor.run(batch)
            finally:
                self._observe(NOTHING)
            self.stats.prompt_tokens += len(chunk)
            yield start, logits

    def _source(self, row: int, tokens: int) -> tuple[int, int]:
        """Page table row and tokens of the source of the sequence that has ``row``."""
        return (self.scheduler.source_row(row), tokens) if self.limits.sources else (0, 0)

    def _observe(self, plan: StepPlan) -> None:
        if self.observer is not None:
            self.observer(plan)

    def _fill(self, plan: StepPlan) -> list[Sequence]:
        """Lay the step's tokens out; the sequences that get a new token from it, in order."""
        pieces: list[Piece] = []
        wanted: list[int] = []
        sequences: list[Sequence] = []
        count = 0
        for chunk in plan.chunks:
            tokens, end = chunk.sequence.tokens, chunk.start + chunk.count
            # A token that only the device knows is 0 here.
            request = chunk.sequence.request
            source = self._source(chunk.row, len(request.source))
            own = tokens[chunk.start : end] or [0]
            pieces.append(Piece(chunk.row, chunk.start, own, *source, len(request.prompt)))
            count += chunk.count
            if end >= len(tokens):
                wanted.append(count - 1)
                sequences.append(chunk.sequence)
        self._batch.fill(pieces, wanted)
        self.stats.preemptions += len(plan.preempted)
        self.stats.prefix_hits += sum(sequence.computed > 0 for sequence in plan.joined)
        self.stats.reused_tokens += sum(sequence.computed for sequence in plan.joined)
        return sequences

    def _collect(self, step: _Begun) -> list[TokenOutput]:
        """Wait for a step; what it is for those that have not ended."""
        tokens = dict(zip(step.sequences, step.tokens(), strict=True))
        self._observe(StepPlan(tuple(step.chunks()), step.plan.preempted))
        outputs: list[TokenOutput] = []
        stats = self.stats
        for chunk in step.chunks():
            sequence = chunk.sequence
            if chunk.count > 1 or chunk.start < len(sequence.request.prompt):
                stats.prompt_tokens += chunk.count
            sequence.computed = chunk.start + chunk.count
            if not sequence.pending:
                token = tokens[sequence]
                sequence.extend(token)
                outputs.append(TokenOutput(sequence, token, sequence.sampler.logprobs))
            # Not before it has its token: a sequence that begins anew has one to run.
            self.scheduler.settle(sequence)
            if sequence.finished is not None:
                self.scheduler.remove(sequence)
        stats.steps += 1
        stats.generated_tokens += len(outputs)
        outputs.sort(key=lambda output: output.sequence.id)
        return outputs
