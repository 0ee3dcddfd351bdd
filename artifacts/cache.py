"""The paged key-value cache's unit, shared by the compiler's kernels and the runtime's allocator."""

PAGE_TOKENS = 32
"""Token positions in one page of the cache."""
