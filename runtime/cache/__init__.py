"""The paged key-value cache: which page belongs to whom (pure), and the memory behind it."""
