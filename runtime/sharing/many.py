"""What an expert with many tokens costs the CPU on this machine: some calls of the bundle's own function, at load."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.sharing import never_falling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

TOKENS = (1, 4, 16, 64)
"""Of each expert."""
EXPERTS = 16
"""About so many at once: more than a cache holds, and work for all threads."""
REPEATS = 3
BUSY = 1.5
"""Times as long as a call takes by itself the link is kept busy beside it."""
MOST_SECONDS = 0.5
"""After which nothing larger is tried."""


def rehearse_many(
    prepare: Callable[[NDArray[np.int64], float], Callable[[], None]],
    top_k: int,
    known: Sequence[int],
    most_tokens: int,
    seed: int = 0,
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Median microseconds of an expert with so many tokens, where it is computed together with others alike.

    Args:
        prepare: makes rows with these choices ``[T, K]``, -1 for none, and keeps the link busy for so many seconds,
            since both read one memory; what it returns computes them.
        top_k: K.
        known: experts that it can be asked for, at least one.
        most_tokens: T, at most.
        seed: of the experts that are taken, each time others, so that no cache has them.

    Returns:
        Numbers of tokens, rising, and their times; none where fewer than two could be measured.
    """
    random, start = np.random.default_rng(seed), time.perf_counter()
    columns = min(top_k, len(known))
    count = columns * max(1, min(len(known), EXPERTS) // columns)

    def seconds(rows: int, link_seconds: float) -> float:
        index = np.full((rows, top_k), -1, np.int64)
        index[:, :columns] = np.resize(random.choice(known, count, replace=False), (rows, columns))
        run = prepare(index, link_seconds)
        before = time.perf_counter()
        run()
        return time.perf_counter() - before

    tried: list[int] = []
    samples: list[float] = []
    for each in TOKENS:
        rows = each * count // columns
        if rows > most_tokens or (len(tried) > 1 and time.perf_counter() - start > MOST_SECONDS):
            break
        alone = seconds(rows, 0.0)
        tried.append(each)
        samples.append(median(seconds(rows, BUSY * alone) for _ in range(REPEATS)) * 1e6 / count)
    return (tuple(tried), never_falling(samples)) if len(tried) > 1 else ((), ())
