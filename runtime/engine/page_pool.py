"""Who holds which page of the key-value cache, and which are kept for whoever has use for what is in them."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class PagePool:
    """Hands out page numbers ``0 .. total-1``; freed pages are reused last in, first out (they are warm).

    A page that is full can be given a name for what is in it. It is never written again, any number of sequences may
    hold it, and when the last one lets go it is kept under its name until no other page is free: then those go that
    were let go of first, as in vLLM's automatic prefix caching.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._holders = [0] * total
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Pages that nobody holds, those that are kept among them."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """Pages that nobody holds and that have a name."""
        return len(self._kept)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """``count`` pages of one's own, or ``None`` (and nothing changes) where fewer are free."""
        if count > self.free:
            return None
        pages = tuple(self._take() for _ in range(count))
        for page in pages:
            self._holders[page] = 1
        return pages

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The pages of ``names``, up to the first name that no page has."""
        pages: list[int] = []
        for name in names:
            page = self._named.get(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def unheld(self, pages: Iterable[int]) -> int:
        """How many of these pages nobody holds."""
        return sum(not self._holders[page] for page in pages)

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages that were found, beside those who hold them already."""
        for page in pages:
            self._kept.pop(page, None)
            self._holders[page] += 1

    def name(self, page: int, name: bytes) -> None:
        """Name a page that one holds; where another page has the name, that one keeps it, and this one gets none."""
        assert self._holders[page], f"page {page} is held by nobody"
        if self._named.setdefault(name, page) == page:
            self._names[page] = name

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages; of those that are kept, the last of ``pages`` is the first to go."""
        for page in reversed(pages):
            assert self._holders[page], f"page {page} was freed twice"
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._names:
                self._kept[page] = None
            else:
                self._free.append(page)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        page, _ = self._kept.popitem(last=False)
        del self._named[self._names.pop(page)]
        return page
