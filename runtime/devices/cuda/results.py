"""Small results that come to the host while the GPU goes on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.runtime.devices.cuda.driver.memory import PinnedMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from moec.runtime.device import View
    from moec.runtime.devices.cuda.driver.functions import Handle
    from moec.runtime.devices.cuda.driver.resources import Resources


class Results:
    """Copies to the host that are in the stream before later steps are.

    Two places take turns: a result must be taken before the second one after it is begun.

    Args:
        resources: of the GPU.
        stream: copies run in it.
        capacity_bytes: of one result.
        enter: makes the GPU the calling thread's.
        mark: called when a result is begun; what it returns is called when that result is there.
    """

    def __init__(
        self,
        resources: Resources,
        stream: Handle,
        capacity_bytes: int,
        enter: Callable[[], None],
        mark: Callable[[], Callable[[], None]],
    ) -> None:
        self._driver, self._stream, self._enter, self._mark = resources.driver, stream, enter, mark
        self._places = [(PinnedMemory(resources, capacity_bytes), resources.event()) for _ in range(2)]

    def begin(self, view: View) -> Callable[[], NDArray[Any]]:
        """Put the copy of what is in ``view`` into the stream.

        Returns:
            What waits for the copy, not for what is put into the stream after it.
        """
        self._enter()
        size = math.prod(view.shape) * np.dtype(view.dtype).itemsize
        place, copied = self._places[0]
        self._places.reverse()
        self._driver.copy_out(place.address, view.address, size, self._stream)
        self._driver.record(copied, self._stream)
        finished = self._mark()

        def wait() -> NDArray[Any]:
            self._enter()
            self._driver.wait(copied)
            finished()
            return place.bytes[:size].view(view.dtype).reshape(view.shape).copy()

        return wait
