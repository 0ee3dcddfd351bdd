"""What there is to choose from: parts of a model, each with its formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moec.artifacts.layout.footprint import LayerFootprint


@dataclass(frozen=True)
class FormatOption:
    """A unit in one format."""

    format: str
    loss: float
    """Divergence that it adds while the same experts are chosen, in nats a token."""
    size_bytes: int
    """Of all of it, as it lies in memory."""
    read_bytes: int = 0
    """Of dense weights those that one token reads."""
    layer: LayerFootprint | None = None
    """Of experts."""
    swaps: float = 0.0
    """Squared noise that it adds to routers' decisions, in squares of nats: see `moec.planning.fitting.losses`."""


@dataclass(frozen=True)
class FitUnit:
    """Weights that have one format; the first option is what the model has now."""

    name: str
    options: tuple[FormatOption, ...]
