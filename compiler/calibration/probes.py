"""Gradients of two things at once: of a drawn continuation's likelihood, and of the routers' narrow decisions."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Gradients: TypeAlias = "tuple[torch.Tensor | None, torch.Tensor | None]"
"""Of the likelihood, and of routing; None: zero."""
NONE: Gradients = (None, None)


def plus(one: Gradients, other: Gradients) -> Gradients:
    """The sum of both."""
    return _plus(one[0], other[0]), _plus(one[1], other[1])


def mapped(change: Callable[[torch.Tensor], torch.Tensor], gradients: Gradients) -> Gradients:
    """Each changed; zero stays zero."""
    likelihood, routing = (None if each is None else change(each) for each in gradients)
    return likelihood, routing


def back(made: Sequence[tuple[torch.Tensor, Gradients]], wanted: Sequence[torch.Tensor]) -> list[Gradients]:
    """The gradients of ``wanted`` from those of what was made of them."""
    likelihood, routing = (_back(made, wanted, probe) for probe in (0, 1))
    return list(zip(likelihood, routing, strict=True))


def _plus(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _back(
    made: Sequence[tuple[torch.Tensor, Gradients]], wanted: Sequence[torch.Tensor], probe: int
) -> Sequence[torch.Tensor | None]:
    pairs = [
        (value, gradient)
        for value, gradients in made
        if (gradient := gradients[probe]) is not None and value.requires_grad
    ]
    if not pairs or not wanted:
        return [None] * len(wanted)
    values, gradients = zip(*pairs, strict=True)
    return torch.autograd.grad(values, wanted, gradients, retain_graph=True, allow_unused=True)
