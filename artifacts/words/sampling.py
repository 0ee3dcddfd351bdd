"""How a GPU is told to choose tokens: the words of a row of options, and the sizes of what ``sample`` works on.

``sample(logits [R, V] float32, options [R, 32] int32, seen [S, ceil(V / 32)] int32, workspace [R * row_bytes(V)]
uint8, tokens [R] int64)``: see ``compiler/kernels/cuda/sample.py``.
"""

from __future__ import annotations

SAMPLE = "sample"
"""The function's name in a CUDA target's module; a model with too many tokens for it has none."""
OPTION_WORDS = 32
"""int32 words of a row of options; those that have no name are 0."""

SLOT = 0
"""Row of ``seen`` that belongs to the sequence; -1: none, the repetition penalty is not applied."""
DO_SAMPLE = 1
"""0: the best token; temperature, top_k, tail, seed and counter are not read."""
FORBIDDEN_COUNT = 2
"""How many of the words from ``FORBIDDEN`` on are token ids that cannot be chosen."""
TEMPERATURE = 3
"""float32."""
TOP_K = 4
"""0: off."""
REPETITION_PENALTY = 5
"""float32; 1: off."""
TAIL = 6
"""float64 in two words, low first: ``1 - top_p``; 0: off."""
SEED = 8
"""uint64 in two words, low first."""
COUNTER = 10
"""uint64 in two words, low first: how many tokens were drawn with this seed before, so 0 for the first."""
FORBIDDEN = 16
MAX_FORBIDDEN = 16

CHUNK = 2048
"""Entries of a row that one block scores."""
BINS = 2048
"""Bins of a row's histogram."""
SPAN = 8192
"""A row of the workspace holds scores for a multiple of this."""


def seen_words(vocab: int) -> int:
    """int32 words of a row of ``seen``: token t is bit ``t % 32`` of word ``t // 32``."""
    return -(-vocab // 32)


def padded(vocab: int) -> int:
    """Scores of a row in the workspace."""
    return -(-vocab // SPAN) * SPAN


def row_bytes(vocab: int) -> int:
    """Bytes of ``workspace`` for one row: scores, a list of as many, chunks' best, counts and masses of bins."""
    entries = padded(vocab)
    return -(-(8 * entries + 8 * (entries // CHUNK) + 12 * BINS) // 64) * 64
