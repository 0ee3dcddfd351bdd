"""Positions for models that count their tokens themselves: patched code takes those of the chain from here."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_POSITIONS: ContextVar[tuple[torch.Tensor, ...]] = ContextVar("positions", default=())


@contextmanager
def given_positions(*positions: torch.Tensor) -> Iterator[None]:
    """Let `positions_of` find ``positions``, each ``[1, T]`` with a T of its own."""
    token = _POSITIONS.set(positions)
    try:
        yield
    finally:
        _POSITIONS.reset(token)


def positions_of(tokens: torch.Tensor) -> torch.Tensor:
    """The positions ``[1, T]`` of tokens ``[1, T]``."""
    # Comparing sizes would guard the graph; their names tell the encoder's tokens from the decoder's.
    return next(found for found in _POSITIONS.get() if str(found.shape[1]) == str(tokens.shape[1]))
