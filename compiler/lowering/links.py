"""Segments that pass values on to one other segment alone: what one kernel makes of them the other's may know of."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.chain import CHAIN_OUTPUT, step_values
from moec.artifacts.steps import SegmentStep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.artifacts.ids import ValueId
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.steps import Step

_Passed = tuple[str, int, str, int]
"""Function and number of an output, function and number of the input that it is."""


@dataclass(frozen=True)
class Link:
    """Two segments of which the second is all that reads some results of the first, for as many tokens."""

    first: str
    reader: str
    passed: tuple[tuple[int, int], ...]
    """Number of an output, and of the input that it is."""


def links_of(model: ModelRecord) -> tuple[Link, ...]:
    """All pairs of functions that are linked wherever one of them is a step.

    Values that cross into the last part of a chain are not passed on like this: only some tokens' rows are there.
    """
    passed: dict[_Passed, int] = defaultdict(int)
    steps: dict[str, int] = defaultdict(int)
    for part in (model.steps[: model.last_step], model.steps[model.last_step :], model.encoder):
        for step in part:
            if isinstance(step, SegmentStep):
                steps[step.function] += 1
        for one in _passed(part, {value for step in model.all_steps for value in _read_outside(step, part)}):
            passed[one] += 1
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for (first, output, reader, number), count in passed.items():
        if count == steps[first] == steps[reader]:
            pairs[first, reader].append((output, number))
    return tuple(Link(first, reader, tuple(sorted(each))) for (first, reader), each in pairs.items())


def _read_outside(step: Step, part: tuple[Step, ...]) -> tuple[ValueId, ...]:
    return () if step in part else step_values(step)[0]


def _passed(part: tuple[Step, ...], elsewhere: set[ValueId]) -> Iterator[_Passed]:
    """What one segment makes and one other reads, once, and nobody else."""
    readers: dict[ValueId, list[tuple[Step, int]]] = defaultdict(list)
    for step in part:
        for number, value in enumerate(step_values(step)[0]):
            readers[value].append((step, number))
    for step in part:
        for output, value in enumerate(step.outputs if isinstance(step, SegmentStep) else ()):
            if len(readers[value]) != 1 or value in elsewhere or value == CHAIN_OUTPUT:
                continue
            reader, number = readers[value][0]
            if isinstance(step, SegmentStep) and isinstance(reader, SegmentStep):
                yield step.function, output, reader.function, number
