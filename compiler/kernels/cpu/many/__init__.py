"""Products of many tokens, which lie across the lanes of vectors: each number of a row meets all of them at once."""
