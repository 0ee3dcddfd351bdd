"""One name for everything that machine code and the host agree on in memory: another one means other words."""

from __future__ import annotations

import hashlib
import json
from functools import cache

from moec.artifacts.words import ahead, mailbox, orders, sampling, slots

CALLS = 1
"""Raised when functions of machine code take other arguments, or begin to mean something else."""
ROOMS = (ahead, mailbox, orders, sampling, slots)
_PLAIN = (int, str, tuple, dict)


def interface() -> str:
    """The first 16 digits of a SHA-256 of all constants of these files, and of where their functions put things."""
    return _digest(json.dumps(constants(), sort_keys=True))


def constants() -> dict[str, object]:
    """Constants by file and name; what functions say of a small layer, a small model and a small vocabulary."""
    found: dict[str, object] = {
        f"{room.__name__.rpartition('.')[2]}.{name}": value
        for room in ROOMS
        for name, value in vars(room).items()
        if name.isupper() and isinstance(value, _PLAIN) and not isinstance(value, bool)
    }
    found["calls"] = CALLS
    found["slots.state_words"] = vars(slots.state_words(13, 5))
    found["ahead.ahead_words"] = ahead.ahead_words(13)
    found["mailbox.mailbox_layout"] = repr(mailbox.mailbox_layout(96, 3))
    found["sampling.row_bytes"] = sampling.row_bytes(1000)
    return found


@cache
def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
