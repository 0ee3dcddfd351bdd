"""What experts cost the CPU on this machine: requests that the host makes itself, before any GPU does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from moec.artifacts.sharing import never_falling
from moec.artifacts.words import mailbox
from moec.errors import DeviceError
from moec.runtime.tensors import array_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.runtime.sharing.mailbox import Mailbox
    from moec.runtime.sharing.team import Team

REPEATS = 5
MOST_SECONDS = 0.5
"""Of all rehearsals: where experts are large and the CPU is slow, a few have to do."""
MOST_EXPERTS = 8
PATIENCE_SECONDS = 60.0

AskedLayer: TypeAlias = tuple[int, int, Sequence[int]]
"""Ordinal, top-k and experts in host memory of an MoE layer."""


class Rehearsal:
    """Makes requests of one token, of ordinary numbers, in a mailbox that no GPU uses yet.

    Args:
        box: the team's.
        team: who answers.
        layers: that can be asked.
        seed: of the experts that are taken, each time others, so that no cache has them; and of the numbers.
    """

    def __init__(self, box: Mailbox, team: Team, layers: Sequence[AskedLayer], seed: int = 0) -> None:
        self._box, self._team = box, team
        self._layers = [layer for layer in layers if layer[2]]
        self._random = np.random.default_rng(seed)

    def microseconds(self) -> tuple[float, ...]:
        """Entry k: median microseconds of k experts of a layer at once, up to the least top-k.

        Where no expert can be asked there is only entry 0.
        """
        if not self._layers:
            return (0.0,)
        most = most_at_once(self._layers)
        samples, start = [0.0], time.perf_counter()
        self._team.begin()
        try:
            self._ask(1)
            for count in range(1, most + 1):
                samples.append(median(self._ask(count) for _ in range(REPEATS)) * 1e6)
                if count > 1 and time.perf_counter() - start > MOST_SECONDS:
                    break
        finally:
            self._team.end()
        return never_falling(samples)

    def _ask(self, count: int) -> float:
        """Seconds that a request of ``count`` experts takes."""
        ordinal, index = drawn_request(self._random, self._layers, count)
        top_k = len(index)
        box, words = self._box, self._box.words
        for place, values in ((box.layout.index, index), (box.layout.weight, np.ones(top_k, np.float32))):
            array_at(*box.view(place))[:top_k] = values
        x = array_at(*box.view(box.layout.x))
        x[:] = self._random.standard_normal(x.shape)
        words[mailbox.LAYER], words[mailbox.COUNT] = ordinal, 1
        number = int(words[mailbox.POSTED]) + 1
        start = time.perf_counter()
        words[mailbox.POSTED] = number
        while words[mailbox.DONE] != number:
            self._team.check()
            if time.perf_counter() - start > PATIENCE_SECONDS:
                raise DeviceError(
                    "The CPU does not answer.",
                    f"An expert took more than {PATIENCE_SECONDS:g} s.",
                    "Use cpu_threads=0.",
                )
        return time.perf_counter() - start


def most_at_once(layers: Sequence[AskedLayer]) -> int:
    """Experts that any of these layers, at least one, can be asked for in one request."""
    return min(MOST_EXPERTS, *(min(top_k, len(experts)) for _, top_k, experts in layers))


def drawn_request(
    random: np.random.Generator, layers: Sequence[AskedLayer], count: int
) -> tuple[int, NDArray[np.int64]]:
    """A layer's ordinal, and ``[K]`` with ``count`` of its experts, then -1."""
    ordinal, top_k, known = layers[int(random.integers(len(layers)))]
    index = np.full(top_k, -1, np.int64)
    index[:count] = random.choice(known, count, replace=False)
    return ordinal, index
