"""A log of compilation that keeps what it is told."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext


class Notes:
    """Stages mean nothing to it."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, _name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def note(self, text: str) -> None:
        self.notes.append(text)
