"""Which bytes of the file of dense weights a section of a chain reads, and where they go in memory. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from moec.artifacts.paths import DENSE_NAME

if TYPE_CHECKING:
    from moec.artifacts.ids import TensorName
    from moec.artifacts.sections import Section

RUN_ALIGNMENT = 256
"""A run begins in memory as far behind a multiple of this as it does in the file."""
MOST_BETWEEN = 4096
"""Bytes that nobody reads between two tensors of a run."""


class DenseRun(NamedTuple):
    """Bytes ``start .. end - 1`` of the file, which go to ``offset``."""

    start: int
    end: int
    offset: int


@dataclass(frozen=True)
class DenseRuns:
    """All dense weights of a section."""

    runs: tuple[DenseRun, ...]
    size_bytes: int
    """Of the memory that they go to."""
    offsets: dict[TensorName, int]
    """Where each tensor lies in it."""


def dense_runs(section: Section) -> DenseRuns:
    """The file in one piece for the whole of a chain, with what it has besides tensors; else in as few as there are."""
    dense = section.bundle.dense
    if section.whole:
        size = section.bundle.manifest.files[DENSE_NAME].size_bytes
        offsets = {name: place.offset_bytes for name, place in dense.items()}
        return DenseRuns((DenseRun(0, size, 0),), size, offsets)
    pieces: list[list[int]] = []
    for place in sorted(dense.values(), key=lambda place: place.offset_bytes):
        start, end = place.offset_bytes, place.offset_bytes + place.size_bytes
        if pieces and start <= pieces[-1][1] + MOST_BETWEEN:
            pieces[-1][1] = max(end, pieces[-1][1])
        else:
            pieces.append([start, end])
    runs: list[DenseRun] = []
    size = 0
    for start, end in pieces:
        offset = -(-size // RUN_ALIGNMENT) * RUN_ALIGNMENT + start % RUN_ALIGNMENT
        runs.append(DenseRun(start, end, offset))
        size = offset + end - start
    return DenseRuns(tuple(runs), size, {name: _place(runs, dense[name].offset_bytes) for name in dense})


def _place(runs: list[DenseRun], start: int) -> int:
    run = next(run for run in runs if run.start <= start < run.end)
    return run.offset + start - run.start
