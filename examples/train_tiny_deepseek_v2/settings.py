"""What decides the result of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import click

RATES = "0:0.005,199:1,1920:1,2400:0.625"


@dataclass(frozen=True)
class Settings:
    """What decides the result; the file names and the thread count do not."""

    steps: int
    batch_tokens: int
    learning_rate: float
    weight_decay: float
    dropout: float
    balance: float
    rates: str
    seed: int

    def rate(self, step: int) -> float:
        """The learning rate of a step: lines between the points of ``rates``, and to zero at the end."""
        points = [point.split(":") for point in self.rates.split(",")]
        ways = [(int(at), float(share)) for at, share in points] + [(self.steps, 0.0)]
        for (low, first), (high, second) in pairwise(ways):
            if step < high:
                return self.learning_rate * (first + (second - first) * (step - low) / (high - low))
        return 0.0

    def check_resumes(self, saved: dict[str, Any], step: int) -> None:
        """Refuses a saved state that a run with these settings would not have come by."""
        other = Settings(**saved)
        if replace(other, steps=self.steps, rates=self.rates) != self:
            raise click.ClickException(f"the saved state is of another run: {saved}")
        if any(not math.isclose(self.rate(at), other.rate(at), rel_tol=1e-9) for at in range(step)):
            raise click.ClickException("the learning rate of the steps that were done is another")
