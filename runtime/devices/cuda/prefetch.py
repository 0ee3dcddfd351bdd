"""While attention reads the little that it needs, the weights after it come into the GPU's second-level cache.

A step of few tokens is a chain of small kernels that wait for each other, and between them the memory idles. What it
could bring in that time is known: the dense weights of the calls up to the next routed experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moec.artifacts.model import AttentionStep, ExpertsStep, SegmentStep
from moec.artifacts.prefetch import FEW_TOKENS, RANGE_MULTIPLE, RANGES
from moec.runtime.devices.protocol import PackedCall, View

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from moec.artifacts.ids import TensorName
    from moec.artifacts.model import ModelRecord, Step
    from moec.runtime.devices.cuda.device import CudaDevice


class Range(NamedTuple):
    """Weights in the GPU's memory."""

    address: int
    size_bytes: int


class WeightPrefetch:
    """Makes the calls that prefetch, one before each attention.

    Args:
        device: the GPU.
        function: the module's ``prefetch``.
        model: the chain.
        weights: address and bytes of each dense weight.
        limit_bytes: of a call: what the second-level cache keeps until it is used.
    """

    def __init__(
        self,
        device: CudaDevice,
        function: Callable[..., Any],
        model: ModelRecord,
        weights: Mapping[TensorName, Range],
        limit_bytes: int,
    ) -> None:
        self._function = function
        tables = {
            number: _table(following(model.steps[number + 1 :], weights, limit_bytes))
            for number, step in enumerate(model.steps)
            if isinstance(step, AttentionStep)
        }
        self._memory = device.hold(np.stack(list(tables.values())))
        self._tensors = {
            number: device.tensor(View(self._memory.address + place * table.nbytes, "int64", table.shape))
            for place, (number, table) in enumerate(tables.items())
        }

    def before(self, number: int, tokens: int) -> list[PackedCall]:
        """What precedes step ``number`` of the chain."""
        if tokens > FEW_TOKENS or number not in self._tensors:
            return []
        return [PackedCall("attention", self._function, (self._tensors[number],))]


def table_bytes(model: ModelRecord) -> int:
    """What the tables take on the GPU."""
    return 8 * 2 * RANGES * sum(isinstance(step, AttentionStep) for step in model.steps)


def following(
    steps: Sequence[Step], weights: Mapping[TensorName, Range], limit_bytes: int
) -> tuple[Range, ...]:
    """What ``steps`` read before their first routed experts, in order of use: as much as the limit holds."""
    found: dict[TensorName, Range] = {}
    left = limit_bytes
    for name in _names(steps):
        if name in found or len(found) == RANGES or not left:
            continue
        size = min(left, weights[name].size_bytes) // RANGE_MULTIPLE * RANGE_MULTIPLE
        if size and weights[name].address % RANGE_MULTIPLE == 0:
            found[name] = Range(weights[name].address, size)
            left -= size
    return tuple(found.values())


def _names(steps: Sequence[Step]) -> Iterator[TensorName]:
    for step in steps:
        if isinstance(step, (AttentionStep, ExpertsStep)):
            return
        assert isinstance(step, SegmentStep)
        yield from step.weights


def _table(ranges: Sequence[Range]) -> NDArray[np.int64]:
    table = np.zeros((RANGES, 2), np.int64)
    for place, each in enumerate(ranges):
        table[place] = each
    return table
