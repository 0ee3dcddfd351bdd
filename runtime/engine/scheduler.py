"""Who runs in the next step, with how many tokens, on which pages: a state machine without tensors."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.steps import CapacityStep
from moec.runtime.engine.page_pool import PagePool
from moec.runtime.engine.pages import Lease, PageTable, pages_for, table_rows
from moec.runtime.engine.prefixes import Prefixes

if TYPE_CHECKING:
    from moec.artifacts.model import ModelRecord
    from moec.runtime.engine.sequence import Sequence


MIXED_STEP_TOKENS = 1024
"""Of a step in which sequences decode: their next tokens wait for all of it."""


@dataclass(frozen=True)
class Limits:
    """Sizes that the engine was given memory for."""

    max_batch: int
    """Sequences that run at once."""
    max_step_tokens: int
    """Tokens of one step, all sequences together. Above ``max_batch``: prompts advance while all decode."""
    max_context: int
    """Tokens of one sequence."""
    cache_pages: int
    sources: bool = False
    """Whether sequences have a source, which an encoder reads; a step holds all of one."""
    whole_prompts: bool = False
    """Whether a prompt must be in one step, because its tokens compete for the capacity of experts."""
    prefix_caching: bool = False
    """Whether pages stand for the beginning of a prompt with the same tokens: not where there are sources, states or
    whole prompts (see `moec.runtime.loading.prefixes`)."""

    @property
    def mixed_step_tokens(self) -> int:
        """Tokens of a step in which sequences decode; where steps can be so large, half are for prompts."""
        if self.whole_prompts:
            return self.max_step_tokens
        return min(self.max_step_tokens, max(MIXED_STEP_TOKENS, 2 * self.max_batch))


def limits_of(
    model: ModelRecord,
    max_batch: int,
    max_step_tokens: int,
    cache_pages: int,
    *,
    prefix_caching: bool = False,
) -> Limits:
    """The limits that a model's engine has."""
    return Limits(
        max_batch,
        max_step_tokens,
        model.max_context,
        cache_pages,
        sources=bool(model.encoder),
        whole_prompts=any(isinstance(step, CapacityStep) for step in model.steps),
        prefix_caching=prefix_caching,
    )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start .. start + count - 1`` of a sequence run in this step."""

    sequence: Sequence
    row: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: its chunks, and the sequences that lost their pages for it (they are recomputed later)."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[Sequence, ...]
    joined: tuple[Sequence, ...] = ()
    """Those that begin, or begin anew; what they have computed already is in pages that they took over."""


class Scheduler:
    """First come, first served; decoding sequences first, then prompts in chunks of what is left.

    A step may be large while all that runs are prompts. As soon as one sequence decodes, steps are short, so that it
    does not wait long for each of its tokens while others join; prompts still get on in every step.

    When pages run out, the youngest running sequence gives its pages back and is recomputed when there is
    room; an older sequence never yields to a younger one, so the oldest always advances.

    With ``prefix_caching`` a sequence that joins takes over the pages that hold its beginning. Where one that runs is
    about to fill the next of them, it waits for that instead of computing the same.
    """

    def __init__(self, limits: Limits) -> None:
        assert limits.max_step_tokens > limits.max_batch >= 1
        assert not (limits.prefix_caching and (limits.sources or limits.whole_prompts))
        self.limits = limits
        self.pages = PagePool(limits.cache_pages)
        self._prefixes = Prefixes(self.pages, on=limits.prefix_caching)
        rows = table_rows(limits.max_batch, sources=limits.sources)
        self.table = PageTable(rows, min(limits.max_context, limits.cache_pages * PAGE_TOKENS))
        self.spare_row = limits.max_batch
        """A page table row that no sequence uses: for `Engine.score`."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._rows = list(range(limits.max_batch - 1, -1, -1))

    def source_row(self, row: int) -> int:
        """The page table row of the source of the sequence that has ``row``."""
        return row + self.limits.max_batch + 1

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; it joins at a coming step."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and its pages back."""
        if sequence.lease is not None:
            self._release(sequence)
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> StepPlan:
        """Choose the next step and reserve its pages. See `settle` for when it has run."""
        joined: list[Sequence] = []
        chunks: dict[int, Chunk] = {}
        preempted: list[Sequence] = []
        decoding = any(sequence.pending == 1 for sequence in self.running)
        left = self.limits.mixed_step_tokens if decoding else self.limits.max_step_tokens
        for sequence in sorted(self.running, key=lambda item: (item.pending != 1, item.id)):
            if sequence.lease is None or left == 0:
                continue
            count = min(sequence.pending, left)
            if count < self._least(sequence):
                continue
            preempted += self._make_room(sequence, sequence.computed + count)
            for victim in preempted:
                if dropped := chunks.pop(victim.id, None):
                    left += dropped.count
            if sequence.lease is not None:
                chunks[sequence.id] = self._chunk(sequence, count, sequence.computed)
                left -= count
        if not preempted:
            joined = self._admit(chunks, left)
        return StepPlan(tuple(chunks.values()), tuple(preempted), tuple(joined))

    def settle(self, sequence: Sequence) -> None:
        """Let others take over the pages that a running sequence has filled; its ``computed`` says how far it is."""
        self._prefixes.settle(sequence)

    def follow(self, plan: StepPlan) -> StepPlan | None:
        """The step after ``plan``, whose tokens are not known yet: each of its sequences goes one token further.

        ``None`` where the next step is another one, or depends on these tokens: a sequence ended, has part of its
        prompt left or gets its last token, one waits that could join, or there are not enough pages.
        """
        missing = 0
        for chunk in plan.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            if sequence.lease is None or end != len(sequence.tokens) or sequence.left < 2:
                return None
            missing += sequence.lease.missing(end + 1)
        if (
            len(plan.chunks) != len(self.running)
            or missing > self.pages.free
            or self._beginning_of_next() is not None
        ):
            return None
        chunks = (self._chunk(chunk.sequence, 1, chunk.start + chunk.count) for chunk in plan.chunks)
        return StepPlan(tuple(chunks), ())

    def restart(self) -> None:
        """Let running sequences compute their tokens anew on the pages that they have, but for settled ones.

        Whoever was about to join, to lose its pages or to leave when the step ended, by Ctrl-C, has none.
        """
        leaving = (sequence for sequence in self.running if sequence.finished is not None)
        for sequence in (*self.waiting, *leaving):
            if sequence.lease is not None:
                self._release(sequence)
        self.running = [sequence for sequence in self.running if sequence.lease is not None]
        for sequence in self.running:
            assert sequence.lease is not None
            sequence.computed = sequence.lease.settled * PAGE_TOKENS

    def _chunk(self, sequence: Sequence, count: int, start: int) -> Chunk:
        """Give ``sequence`` the pages that ``count`` tokens from ``start`` on lack; they are free."""
        lease = sequence.lease
        assert lease is not None
        missing = lease.missing(start + count)
        if missing:
            pages = self.pages.allocate(missing)
            assert pages is not None
            self.table.assign(lease.row, len(lease.pages), pages)
            lease.pages += pages
        return Chunk(sequence, lease.row, start, count)

    def _make_room(self, sequence: Sequence, tokens: int) -> list[Sequence]:
        """Preempt from the youngest on until ``sequence`` can hold ``tokens``, or is itself preempted."""
        victims: list[Sequence] = []
        while sequence.lease is not None and sequence.lease.missing(tokens) > self.pages.free:
            victim = max(self.running, key=lambda item: item.id)
            self.waiting.appendleft(victim)
            self.running.remove(victim)
            self._release(victim)
            victims.append(victim)
        return victims

    def _admit(self, chunks: dict[int, Chunk], left: int) -> list[Sequence]:
        """Let sequences join, those that wait longest first; ``chunks`` gets theirs, of ``left`` tokens in all."""
        joined: list[Sequence] = []
        while left > 0 and (found := self._beginning_of_next()) is not None:
            sequence = self.waiting[0]
            if left < self._least(sequence) or self._prefixes.coming(sequence, found, self.running):
                break
            self._lend(sequence, found)
            self.running.append(sequence)
            self.waiting.popleft()
            joined.append(sequence)
            count = min(sequence.pending, left)
            chunks[sequence.id] = self._chunk(sequence, count, sequence.computed)
            left -= count + len(sequence.request.source)
        return joined

    def _lend(self, sequence: Sequence, found: tuple[int, ...]) -> None:
        """Give a sequence that joins a row, pages for its source, and those ``found`` that hold its beginning."""
        self.pages.hold(found)
        source = self.pages.allocate(pages_for(len(sequence.request.source)))
        assert source is not None
        sequence.lease = lease = Lease(self._rows.pop(), list(found), source, settled=len(found))
        if source:
            self.table.assign(self.source_row(lease.row), 0, source)
        if found:
            self.table.assign(lease.row, 0, found)
        sequence.computed = len(found) * PAGE_TOKENS
        if sequence.reused is None:
            sequence.reused = sequence.computed

    def _least(self, sequence: Sequence) -> int:
        """The fewest tokens that a sequence can run in its next step."""
        whole = self.limits.whole_prompts and sequence.computed == 0
        return len(sequence.request.prompt) if whole else 1

    def _beginning_of_next(self) -> tuple[int, ...] | None:
        """The pages that hold the beginning of the first that waits; ``None``: none waits, or finds row and room."""
        if not (self.waiting and self._rows):
            return None
        found = tuple(self._prefixes.find(self.waiting[0]))
        return found if self._has_headroom(self.waiting[0], found) else None

    def _has_headroom(self, sequence: Sequence, found: tuple[int, ...]) -> bool:
        """Room for all its tokens beside what the running ones still need, and a page each to go on.

        Without the extra pages a newcomer would be preempted as soon as the others cross a page boundary.
        """
        promised = 0
        for item in self.running:
            assert item.lease is not None
            promised += item.lease.missing(len(item.tokens)) + 1
        # Pages that are kept are free; those that others hold take no room.
        shared = len(found) - self.pages.unheld(found)
        own = pages_for(len(sequence.tokens)) - shared + pages_for(len(sequence.request.source))
        return own + promised <= self.pages.free

    def _release(self, sequence: Sequence) -> None:
        lease = sequence.lease
        assert lease is not None
        # First: nothing may be let go of twice.
        sequence.lease = None
        sequence.computed = 0
        self.pages.release((*lease.pages, *lease.source))
        self._rows.append(lease.row)
