"""Pages against a plain model of who has them: none is lost, none is given twice, the right ones are kept."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moec.runtime.engine.page_pool import PagePool

PAGES = 7
NAMES = [bytes([number]) for number in range(5)]


class Pool(RuleBasedStateMachine):
    """What a pool should be: lists of pages that somebody holds, names, kept pages in the order in which they go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES)
        self.held: list[list[int]] = []
        self.names: dict[int, bytes] = {}
        self.kept: list[int] = []

    @rule(count=st.integers(0, PAGES + 1))
    def allocate(self, count: int) -> None:
        unused = self.unused()
        pages = self.pool.allocate(count)
        if count > len(unused) + len(self.kept):
            assert pages is None
            return
        assert pages is not None
        evicted = self.kept[: max(0, count - len(unused))]
        assert len(set(pages)) == count
        assert set(pages) - set(evicted) <= unused
        assert set(evicted) <= set(pages)
        for page in evicted:
            self.kept.remove(page)
            del self.names[page]
        self.held.append(list(pages))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(pages)
        for page in reversed(pages):
            if page in self.names and not self.holders(page):
                self.kept.append(page)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def name(self, data: st.DataObject, name: bytes) -> None:
        page = data.draw(st.sampled_from(sorted({page for pages in self.held for page in pages})))
        if page in self.names:
            return
        self.pool.name(page, name)
        if name not in self.names.values():
            self.names[page] = name

    @rule(names=st.permutations(NAMES), count=st.integers(0, len(NAMES)))
    def take_over(self, names: list[bytes], count: int) -> None:
        found = self.pool.find(names[:count])
        expected: list[int] = []
        for name in names[:count]:
            own = [page for page, given in self.names.items() if given == name]
            if not own:
                break
            expected += own
        assert found == expected
        assert self.pool.unheld(found) == sum(page in self.kept for page in found)
        self.pool.hold(found)
        self.kept = [page for page in self.kept if page not in found]
        self.held.append(found)

    @invariant()
    def all_pages_are_somewhere(self) -> None:
        assert self.pool.kept == len(self.kept)
        assert self.pool.free == len(self.kept) + len(self.unused())

    def holders(self, page: int) -> int:
        return sum(pages.count(page) for pages in self.held)

    def unused(self) -> set[int]:
        return {page for page in range(PAGES) if not self.holders(page)} - set(self.kept)

    def teardown(self) -> None:
        for pages in self.held:
            self.pool.release(pages)
        assert sorted(self.pool.allocate(PAGES) or ()) == list(range(PAGES))


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)


def test_the_end_of_a_chain_goes_before_its_beginning_and_the_oldest_chain_first() -> None:
    pool = PagePool(4)
    chains = []
    for first in (b"a", b"c"):
        pages = pool.allocate(2)
        assert pages is not None
        for page, name in zip(pages, (first, first + b"2"), strict=True):
            pool.name(page, name)
        chains.append(pages)
    pool.release(chains[0])
    pool.release(chains[1])
    assert (pool.free, pool.kept) == (4, 4)
    gone = []
    for _ in range(4):
        (page,) = pool.allocate(1) or ()
        gone.append(page)
    assert gone == [chains[0][1], chains[0][0], chains[1][1], chains[1][0]]
