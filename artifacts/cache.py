"""The paged cache's unit, shared by the compiler's kernels and the runtime's allocator."""

PAGE_TOKENS = 32
"""Token positions in one page of the cache."""

SELECTION_PREFIX = "selection_"
"""Before the name of a selection of positions: its kernel."""


def selection_words(max_context: int) -> int:
    """Words of 32 bits, one a page, that say which positions of a sequence are selected."""
    return -(-max_context // PAGE_TOKENS)
