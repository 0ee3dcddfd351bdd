"""What ``moec compile --fit`` chose: formats of weights, by what they cost in accuracy, for a size or a speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from moec.artifacts.quantization import Role  # noqa: TC001 - the codec reads the types of records

Measured: TypeAlias = Literal["divergence", "weights"]
"""What losses are: the predicted divergence from the unquantized model, in nats a token; or, where the model could not
be run, the sum over matrices of the squared error's share of the squared values."""


@dataclass(frozen=True)
class FittedUnit:
    """Weights that have one format: the routed experts of a layer, the products of one segment step, a table."""

    name: str
    """A module of experts, or the first of the parameters."""
    role: Role
    parameters: tuple[str, ...]
    """Names in transformers; of experts that of the down matrices."""
    format: str
    """A name in ``moec.formats.FORMATS``, or ``plain``."""
    size_bytes: int
    loss: float
    """That this unit adds."""


@dataclass(frozen=True)
class FitRecord:
    """The choice, and what it was made from."""

    target: str
    """As the person gave it: ``8GiB``, ``20ms``."""
    machine: str | None
    """Whose speeds a time was predicted with; None where the target is a size."""
    measured: Measured
    tokens: int
    """Of the calibration set; 0 where ``measured`` is ``weights``."""
    loss: float
    """Of all units together."""
    resident_bytes: int
    """Everything with all experts in the fastest tier, one sequence of the usual context included."""
    milliseconds_per_token: float | None
    """Predicted, where the target is a time."""
    units: tuple[FittedUnit, ...]
