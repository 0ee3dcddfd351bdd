"""How a GPU has missing experts brought by its copy engine in the middle of a captured step: a book of orders.

Loads of kernels stop at 91 to 93 % of what the copy engine reaches, and only the host can put copies into a stream. So
a layer that misses experts writes what it wants into a block of pinned host memory: the GPU's ``order_experts`` writes
copies, then the order's number to ``POSTED``; the host's ``feed_copies`` (a function of the CPU's module; a thread of
its own is in it from load to close) calls the driver for each copy, and behind each has the stream write how many there
have been by then; ``order_experts`` looks at that and counts the pieces that have arrived for the kernels that wait for
them. A layer that misses nothing makes no order. Orders follow each other strictly, so one set of places is enough.

Nobody has to come: where copies do not arrive in time, ``order_experts`` cancels the order and reads host memory
itself. What the host's thread has begun by then may still come. It brings what is there already; so until it is over
(``COPIED`` has reached ``ORDERED``) no other order is made, experts keep their slots, and nothing goes to the stage.

Words are int64. Each that one side writes while the other looks at it has a line of its own.
"""

from __future__ import annotations

from moec.artifacts.words import slots

ORDER = "order_experts"
"""The GPU's function: ``order_experts(state, notes, book, copies)``, in place of ``fetch_experts(state)``."""
FEED = "feed_copies"
"""The CPU's function: ``feed_copies(book, copies, control, driver)``."""

BOOK_WORDS = 80
POSTED = 0
"""Number of the last order; the GPU writes it, after everything else of the order."""
CLOSED = 16
"""Not 0: the GPU waits for no copy. The host writes it."""
PATIENCE = 17
"""Nanoseconds that the GPU waits for the next copy at most. The host writes it."""
CANCELLED = 32
"""The last order that the GPU waits for no longer. The GPU writes it."""
COUNT = 64
"""Of the order: its copies."""

MOST_COPIES = slots.MOST_ENTRIES + 1
"""Of an order: one for each missing expert, but two for the last."""
COPY_WORDS = 4
"""Of a copy, the last one unused."""
TARGET, SOURCE, SIZE = 0, 1, 2
"""Addresses on the GPU and in pinned host memory, and bytes, which may be 0."""

NOTES_WORDS = 32
"""Of the GPU's own notes, in its memory; zero to begin with."""
SENT = 0
"""Number of the last order."""
ORDERED = 1
"""Copies of all orders so far."""
FED_BYTES, LATE = 2, 3
"""Counters: bytes that were ordered; orders that were cancelled."""
COPIED = 16
"""Copies that are over, modulo 2^32. The copies' stream writes it, as 32 bits."""

DRIVER_WORDS = 8
"""Of what ``feed_copies`` is told of the driver."""
COPY_IN, WRITE_VALUE = 0, 1
"""Addresses of ``cuMemcpyHtoDAsync`` and ``cuStreamWriteValue32``."""
STREAM = 2
"""The stream's handle."""
COUNTER = 3
"""The address of ``COPIED`` on the GPU."""
MADE = 4
"""Copies so far, as ``COPIED`` counts them. The host's thread writes it."""
STATUS = 5
"""What the driver answered when it failed, 0 until then; the thread leaves. The host's thread writes it."""
