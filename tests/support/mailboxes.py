"""A mailbox in plain memory, and what a GPU does with it, for tests of the CPU's side."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.artifacts.words import mailbox
from moec.artifacts.words.mailbox import MailboxPlace, mailbox_layout
from moec.runtime.device import View
from moec.runtime.sharing.mailbox import Mailbox
from moec.runtime.tensors import aligned_zeros, array_at
from tests.support.waiting import wait_until


class HostBox:
    """The memory of a mailbox, and requests as ``post`` and ``collect`` make them."""

    def __init__(self, hidden: int, top_k: int) -> None:
        layout = mailbox_layout(hidden, top_k)
        self._memory = aligned_zeros((layout.size_bytes + 256,), np.uint8)
        self.hidden = hidden
        self.box = Mailbox(-(-self._memory.ctypes.data // 256) * 256, layout)
        self.number = 0

    def array(self, place: MailboxPlace) -> NDArray[Any]:
        """One of the mailbox's tensors."""
        view: View = self.box.view(place)
        return array_at(*view)

    def post(
        self, layer: int, x: NDArray[np.float32], index: NDArray[np.int64], weight: NDArray[np.float32]
    ) -> None:
        """Make a request: x ``[T, H]``, index and weight ``[T, K]``."""
        layout, words = self.box.layout, self.box.words
        for place, values in ((layout.x, x), (layout.index, index), (layout.weight, weight)):
            self.array(place)[: values.size] = values.ravel()
        self.array(layout.out)[:] = np.nan
        words[mailbox.LAYER], words[mailbox.COUNT] = layer, len(x)
        self.number += 1
        words[mailbox.POSTED] = self.number

    def answered(self) -> bool:
        """Whether the last request is done."""
        return bool(self.box.words[mailbox.DONE] == self.number)

    def collect(self, tokens: int) -> NDArray[np.float32]:
        """Wait for the sums ``[T, H]`` of the last request."""
        wait_until(self.answered)
        return self.array(self.box.layout.out)[: tokens * self.hidden].reshape(tokens, -1).copy()
