"""How a GPU hands experts to the CPU in the middle of a captured step: one block of pinned host memory, the mailbox.

A layer's exchange is a *request*, numbered from 1. The GPU's ``post_<body>`` writes the layer, the step's vectors and
the CPU's part of the routing, then the request's number to ``POSTED``; the CPU's ``serve_experts`` writes the weighted
sums and then the number to ``DONE``; the GPU's ``collect_<body>`` waits for that and adds them. A layer of which the
CPU computes nothing makes no request. Requests follow each other strictly, so one set of places is enough.

Words are int64. Each that one side writes while the other looks at it has a line of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

SERVE = "serve_experts"
"""The CPU's function, of all bodies: ``serve_experts(words, index, weight, x, out, control, layers, middle)``."""
ENTRIES = 256
"""Choices (tokens times top-k) of a request at most: larger steps stream experts through the GPU."""

WORDS = 128
POSTED = 0
"""Number of the last request; the GPU writes it, after everything else of the request."""
DONE = 16
"""Number of the last request whose sums are there; the CPU writes it."""
ABORT = 32
"""Not 0: the GPU waits no longer. The host writes it."""
LIMIT = 33
"""Nanoseconds that the GPU waits for a request at most. The host writes it."""
FAILED = 48
"""The request that the GPU gave up, 0 where there is none; from then on it makes no requests. The GPU writes it."""
LAYER = 64
"""Of the request: ordinal of the MoE layer."""
COUNT = 65
"""Of the request: its tokens T."""

SENT_WORDS = 4
"""Of the GPU's own notes, int64 in its memory; zero to begin with."""
SENT = 0
"""Number of the last request."""
PENDING = 1
"""Whether the layer at work made one."""
BROKEN = 2
"""Whether the GPU gave up waiting."""
TAKEN = 3
"""Number of the last request whose sums were taken: less than ``SENT`` after a step that ended in its middle."""

CONTROL_WORDS = 128
"""Of what the CPU's threads share among themselves; zero to begin with, but for ``CHUNKS``, ``SPINS`` and
``WATCHES``."""
STOP = 0
"""Not 0: leave."""
EPOCH = 1
"""Odd while a step is at work, and changed by whoever wakes threads."""
CHUNKS = 2
"""Pieces that each of a request's two phases is cut into; fixed while threads run."""
SPINS = 3
"""Looks at ``POSTED`` before a thread sleeps, where no step is at work."""
WATCHES = 5
"""Times ``SPINS`` looks within a step, without a request, after which threads nap between two looks."""
SERVING = 4
"""Threads that are looking for requests."""
GATE_TAKEN = 16
"""Pieces of the first phase that were ever given to a thread, then those that are finished; each of the second."""
GATE_FINISHED = 32
DOWN_TAKEN = 48
DOWN_FINISHED = 64

LAYER_WORDS = 4
"""Of a MoE layer in ``layers``: address of its table of experts, experts, top-k, number of the body in the model."""
TABLE = 0
EXPERTS = 1
CHOSEN = 2
BODY = 3

_ALIGNMENT = 256


def post_name(body: str) -> str:
    """The GPU's function that makes a request."""
    return f"post_{body}"


def collect_name(body: str) -> str:
    """The GPU's function that waits for a request's sums and adds them."""
    return f"collect_{body}"


@dataclass(frozen=True)
class MailboxPlace:
    """One tensor in the mailbox."""

    offset_bytes: int
    dtype: str
    count: int


@dataclass(frozen=True)
class MailboxLayout:
    """Where everything lies, from the mailbox's first byte."""

    words: MailboxPlace
    index: MailboxPlace
    """``[T, K]`` of the request, densely: expert numbers, -1 where the choice is not the CPU's."""
    weight: MailboxPlace
    """``[T, K]``."""
    x: MailboxPlace
    """``[T, H]``."""
    out: MailboxPlace
    """``[T, H]``."""
    size_bytes: int


def mailbox_layout(hidden: int, top_k: int) -> MailboxLayout:
    """The mailbox of a model.

    Args:
        hidden: H.
        top_k: the least K of its layers.
    """
    offset = 0
    places: dict[str, MailboxPlace] = {}
    values = ENTRIES // top_k * hidden
    sizes = {"words": WORDS, "index": ENTRIES, "weight": ENTRIES, "x": values, "out": values}
    for name, count in sizes.items():
        dtype = "int64" if name in ("words", "index") else "float32"
        places[name] = MailboxPlace(offset, dtype, count)
        size = count * (8 if dtype == "int64" else 4)
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    return MailboxLayout(**places, size_bytes=offset)
