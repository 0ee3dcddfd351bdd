"""Segments that pass values on to one other segment alone: what one kernel makes of them the other's may know of."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from moec.artifacts.layout.chain import CHAIN_OUTPUT, step_values
from moec.artifacts.steps import SegmentStep

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moec.artifacts.ids import ValueId
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.steps import Step


@dataclass(frozen=True)
class Link:
    """Two segments of which the second is all that reads some results of the first, for as many tokens."""

    first: str
    reader: str
    passed: tuple[tuple[int, int], ...]
    """Number of an output, and of the input that it is."""


class _Passed(NamedTuple):
    first: str
    output: int
    reader: str
    input: int


def links_of(model: ModelRecord) -> tuple[Link, ...]:
    """All pairs of functions that are linked wherever one of them is a step.

    Values that cross into the last part of a chain are not passed on like this: only some tokens' rows are there.
    """
    parts = (model.steps[: model.last_step], model.steps[model.last_step :], model.encoder)
    steps = Counter(step.function for step in model.all_steps if isinstance(step, SegmentStep))
    passed: Counter[_Passed] = Counter()
    for number, part in enumerate(parts):
        others = [step for other in (*parts[:number], *parts[number + 1 :]) for step in other]
        passed.update(_passed(part, {value for step in others for value in step_values(step)[0]}))
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for one, count in passed.items():
        if count == steps[one.first] == steps[one.reader]:
            pairs[one.first, one.reader].append((one.output, one.input))
    return tuple(Link(first, reader, tuple(sorted(each))) for (first, reader), each in pairs.items())


def _passed(part: Sequence[Step], elsewhere: set[ValueId]) -> Iterator[_Passed]:
    """What one segment makes and one other reads, once, and nobody else."""
    readers: dict[ValueId, list[tuple[Step, int]]] = defaultdict(list)
    for step in part:
        for number, value in enumerate(step_values(step)[0]):
            readers[value].append((step, number))
    for step in (step for step in part if isinstance(step, SegmentStep)):
        for output, value in enumerate(step.outputs):
            if len(readers[value]) != 1 or value in elsewhere or value == CHAIN_OUTPUT:
                continue
            reader, number = readers[value][0]
            if isinstance(reader, SegmentStep):
                yield _Passed(step.function, output, reader.function, number)
