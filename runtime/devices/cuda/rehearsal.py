"""What experts cost the CPU beside this GPU: requests as steps make them, by the GPU's clock."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.sharing import MAILBOX_US, is_steady, never_falling
from moec.runtime.device import View
from moec.runtime.sharing.rehearsal import MOST_SECONDS, drawn_request, most_at_once

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.model import ModelRecord
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.sharing import CpuShare

WARM_ROUNDS, ROUNDS = 2, 11
"""Of one request of each number of experts; threads and memory take some to get going."""
ATTEMPTS = 3
"""Where times are not steady: somebody else had the processors meanwhile, and a load's shares stand until its end."""


class GpuRehearsal:
    """Makes requests of one token, of ordinary numbers, before any step does.

    The host only waits, as it does for a step: where it looks at the mailbox itself, in Python, it takes a processor
    from the team, and sees the answer late.

    Args:
        device: the GPU.
        share: the CPU's side.
        model: its MoE layers.
        known: of each layer, by ordinal, the experts in host memory.
        seed: of the experts that are taken, each time others, so that no cache has them; and of the numbers.
    """

    def __init__(
        self,
        device: CudaDevice,
        share: CpuShare,
        model: ModelRecord,
        known: Sequence[Sequence[int]],
        seed: int = 0,
    ) -> None:
        self._device, self._share, self._random = device, share, np.random.default_rng(seed)
        self._layers = [
            (number, layer.top_k, experts)
            for number, (layer, experts) in enumerate(zip(model.experts, known, strict=True))
            if experts
        ]
        self._x, self._out, self._index, self._weight = share.scratch
        self._hidden = model.hidden_size
        device.write(self._x, self._random.standard_normal(self._hidden, np.float32))
        resources = device.resources
        self._start, self._end = resources.event(timed=True), resources.event(timed=True)

    def microseconds(self) -> tuple[float, ...]:
        """Entry k: median microseconds of k experts of a layer at once, up to the least top-k.

        What a request takes beyond a layer without one, less what the handshake does. Where no expert can be asked
        there is only entry 0.

        Raises:
            DeviceError: a thread failed, or did not answer.
        """
        if not self._layers:
            return (0.0,)
        best = self._attempt()
        for _ in range(ATTEMPTS - 1):
            if is_steady(best):
                break
            best = tuple(map(min, best, self._attempt()))
        return never_falling(best)

    def _attempt(self) -> tuple[float, ...]:
        """Such times, as they are."""
        samples: list[list[float]] = [[] for _ in range(most_at_once(self._layers) + 1)]
        team, start = self._share.team, time.perf_counter()
        team.begin()
        try:
            for turn in range(WARM_ROUNDS + ROUNDS):
                late = time.perf_counter() - start > MOST_SECONDS
                if late and samples[0]:
                    break
                for count, own in enumerate(samples):
                    taken = self._ask(count)
                    if turn >= WARM_ROUNDS or late:
                        own.append(taken)
        finally:
            team.end()
        none = median(samples[0])
        return (0.0, *(max(0.0, median(own) - none - MAILBOX_US) for own in samples[1:]))

    def _ask(self, count: int) -> float:
        """Microseconds of a layer of which the CPU computes ``count`` experts and the GPU none."""
        device, driver, share = self._device, self._device.driver, self._share
        ordinal, drawn = drawn_request(self._random, self._layers, count)
        index = drawn[None]
        device.write(self._index, index)
        device.write(self._weight, np.ones(index.shape, np.float32))
        x, out = (View(address, "float32", (1, self._hidden)) for address in (self._x, self._out))
        chosen = View(self._index, "int64", index.shape), View(self._weight, "float32", index.shape)
        driver.record(self._start, device.stream)
        for call in (*share.post(ordinal, x, *chosen), *share.collect(ordinal, out)):
            call.function(*call.arguments)
        driver.record(self._end, device.stream)
        driver.wait(self._end)
        share.team.check()
        return driver.milliseconds(self._start, self._end) * 1e3
