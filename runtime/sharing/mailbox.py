"""The mailbox between a GPU and the CPU, over memory that both can read and write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.artifacts.words import mailbox
from moec.runtime.device import View
from moec.runtime.tensors import array_at, tensor_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.artifacts.words.mailbox import MailboxLayout, MailboxPlace

LIMIT_NANOSECONDS = 20 * 10**9
"""A GPU that waits longer for one layer waits for somebody who will not come."""


class Mailbox:
    """Tensors of both sides over one block; whoever makes it keeps the memory.

    Args:
        address: of pinned host memory, the same for the CPU and the GPU; a multiple of 256.
        layout: what lies where.
    """

    def __init__(self, address: int, layout: MailboxLayout) -> None:
        self.layout = layout
        self._address = address
        self.words: NDArray[Any] = array_at(*self.view(layout.words))
        """int64, see `moec.artifacts.words.mailbox`."""
        self.words[:] = 0
        self.words[mailbox.LIMIT] = LIMIT_NANOSECONDS

    def view(self, place: MailboxPlace) -> View:
        """Where one of the layout's tensors lies."""
        return View(self._address + place.offset_bytes, place.dtype, (place.count,))

    def host_tensors(self) -> tuple[Any, ...]:
        """words, index, weight, x and out, as ``serve_experts`` takes them."""
        layout = self.layout
        places = layout.words, layout.index, layout.weight, layout.x, layout.out
        return tuple(tensor_at(*self.view(place)) for place in places)

    def restart(self) -> None:
        """Begin with request 1 again; neither side may be at work."""
        for word in (mailbox.POSTED, mailbox.DONE, mailbox.ABORT, mailbox.FAILED):
            self.words[word] = 0

    def abort(self) -> None:
        """Let the GPU wait no longer, now and from now on."""
        self.words[mailbox.ABORT] = 1

    @property
    def failed_request(self) -> int:
        """The request that the GPU gave up, 0 where there is none; right once the step is finished."""
        return int(self.words[mailbox.FAILED])
