"""Prefix caching: pages of the key-value cache that stand for the beginning of a prompt instead of running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.layout.cache import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moec.runtime.engine.page_pool import PagePool
    from moec.runtime.engine.sequence import Sequence


class Prefixes:
    """What running sequences leave in the pool for others, and what those take over. Where it is off, nothing.

    Args:
        pool: of pages.
        on: whether it is on.
    """

    def __init__(self, pool: PagePool, *, on: bool) -> None:
        self._pool, self._on = pool, on

    def find(self, sequence: Sequence) -> list[int]:
        """Pages that hold the longest beginning of a sequence, of which at least one token is left to run."""
        return self._pool.find(self._wanted(sequence))

    def coming(self, sequence: Sequence, found: tuple[int, ...], running: Iterable[Sequence]) -> bool:
        """Whether a running sequence is about to fill the page behind those that were ``found``."""
        wanted, number = self._wanted(sequence), len(found)
        if number == len(wanted):
            return False
        end = (number + 1) * PAGE_TOKENS
        return any(
            item.computed < end <= len(item.tokens) and item.names.first(number + 1)[number] == wanted[number]
            for item in running
        )

    def settle(self, sequence: Sequence) -> None:
        """Name the pages that a running sequence has filled."""
        lease = sequence.lease
        assert lease is not None
        full = sequence.computed // PAGE_TOKENS
        if not self._on or full == lease.settled:
            return
        names = sequence.names.first(full)
        for number in range(lease.settled, full):
            self._pool.name(lease.pages[number], names[number])
        lease.settled = full

    def _wanted(self, sequence: Sequence) -> list[bytes]:
        if not self._on or sequence.request.whole_prompt:
            return []
        return sequence.names.first((len(sequence.tokens) - 1) // PAGE_TOKENS)
