"""Requests run to their ends, and what came of them as one array."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moec.runtime.engine.engine import Engine
    from moec.runtime.engine.sequence import Request
    from moec.runtime.engine.sequence import Sequence as RunningSequence
    from moec.runtime.stops import StopWatch
    from moec.runtime.streamers import Streamer


def run(
    engine: Engine,
    requests: Sequence[Request],
    streamer: Streamer | None = None,
    watches: Sequence[StopWatch] = (),
) -> list[list[int]]:
    """The new tokens of each request; if anything fails, none of them stays in the engine.

    Args:
        engine: runs them, beside what it runs already.
        requests: what is continued.
        streamer: gets the first one's prompt and then each of its tokens.
        watches: one for each request, which says with which token it ends; or none.

    Raises:
        RequestError: one is longer than context or cache.
    """
    sequences: list[RunningSequence] = []
    try:
        for request in requests:
            # Not a comprehension: those already added must be cancelled where a later one is refused.
            sequences.append(engine.add(request))  # noqa: PERF401
        watched = dict(zip(sequences, watches, strict=False))
        if streamer is not None:
            streamer.put(np.array([requests[0].prompt], np.int64))
        while any(sequence.finished is None for sequence in sequences):
            for output in engine.step():
                if streamer is not None and output.sequence is sequences[0]:
                    streamer.put(np.array([output.token], np.int64))
                watch = watched.get(output.sequence)
                if watch is not None and watch.push(output.token):
                    engine.cancel(output.sequence)
    finally:
        for sequence in sequences:
            engine.cancel(sequence)
    if streamer is not None:
        streamer.end()
    return [sequence.new_tokens for sequence in sequences]


def assemble(
    prompts: list[tuple[int, ...]], results: list[list[int]], pad: int, rows: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Prompts and continuations as one array ``[B, T + N]``; ``rows`` are prompts already padded."""
    width = max(map(len, prompts)) if rows is None else rows.shape[-1]
    output = np.full((len(prompts), width + max(map(len, results))), pad, np.int64)
    for row, (prompt, new) in enumerate(zip(prompts, results, strict=True)):
        output[row, width - len(prompt) : width] = prompt
        output[row, width : width + len(new)] = new
    if rows is not None:
        output[:, :width] = rows.reshape(len(prompts), width)
    return output
