"""Lists of calls that were cut short while they were launched: what has to be put right before anything else runs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Unfinished:
    """Knows whether some calls of a list were launched and others were not, by Ctrl-C or an error in between.

    A step that ends in its middle may leave half done what outlives it: an expert was given a slot, and not fetched.
    """

    def __init__(self) -> None:
        self._cut = False
        self._repairs: list[Callable[[], None]] = []

    def repair_with(self, repair: Callable[[], None], *, first: bool = False) -> None:
        """Have ``repair`` called before the next list of calls where one was cut short.

        Args:
            repair: what is called.
            first: before all others.
        """
        self._repairs.insert(0 if first else len(self._repairs), repair)

    def forget(self) -> None:
        """Nothing will run any more."""
        self._repairs.clear()

    @contextmanager
    def launching(self) -> Iterator[None]:
        """The launches of one list: unless all come to pass, the list was cut short."""
        self._cut = True
        yield
        self._cut = False

    def mend(self) -> None:
        """Put right what a list left that was cut short. One that is cut short itself is done again the next time."""
        if self._cut:
            for repair in self._repairs:
                repair()
            self._cut = False
