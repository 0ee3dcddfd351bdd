"""What is named twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def repeated(names: Iterable[str]) -> list[str]:
    """Names that are there more than once, in order."""
    given = list(names)
    return sorted({name for name in given if given.count(name) > 1})


def twice(what: str, names: Iterable[str]) -> Iterator[str]:
    """A sentence for each name that several of ``what`` have."""
    return (f"there are two {what}s called {name}" for name in repeated(names))
