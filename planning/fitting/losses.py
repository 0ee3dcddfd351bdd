"""What a choice of formats is predicted to lose: a sum over units, and the cost of routers' other decisions, no sum."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moec.planning.fitting.units import FitUnit

    Choice = tuple[int, ...]

SWAP_LOSS = 1.0
"""Nats a token where the noise of routers' decisions is one: see `moec.compiler.calibration.routing`."""
PRICE_STEP = 2.0
"""Between the prices of noise that are tried: the least loss is missed by at most 6 % of the part that noise has."""
ROUNDS = 8
"""Most times that a price is corrected."""


def predicted_losses(units: Sequence[FitUnit], chosen: Sequence[int]) -> tuple[float, ...]:
    """What each unit adds to the predicted divergence.

    Noise in a router's scores makes it choose another expert in a share of the tokens that grows as the noise's
    deviation does, so the divergence by that is no sum over units: its square is. A unit's part of it is by its share.
    """
    picked = [unit.options[number] for unit, number in zip(units, chosen, strict=True)]
    noise = sum(option.swaps for option in picked)
    price = SWAP_LOSS / math.sqrt(noise) if noise else 0.0
    return tuple(option.loss + price * option.swaps for option in picked)


def least_loss(units: Sequence[FitUnit], find: Callable[[Sequence[FitUnit]], Choice | None]) -> Choice | None:
    """The choice of least predicted loss, by what ``find`` finds for units whose losses are sums and noise has a price.

    The root of the noise is the least of ``noise x price + 1 / (4 price)`` over all prices, so the best choice is what
    is found at the price that its own noise has. Prices at all noise that there can be are tried, and from the best
    choice on the price at each one found: no such round is worse, since the line that touches the root is above it.
    """

    def loss(chosen: Choice) -> float:
        return sum(predicted_losses(units, chosen))

    @cache
    def at(noise: float) -> Choice | None:
        price = SWAP_LOSS / (2 * math.sqrt(noise)) if noise else 0.0
        return find([_priced(unit, price) for unit in units])

    best = at(0.0)
    if best is None:
        return None
    for noise in _noises(units):
        best = min(best, at(noise) or best, key=loss)
    for _ in range(ROUNDS):
        found = at(sum(unit.options[number].swaps for unit, number in zip(units, best, strict=True)))
        if found is None or loss(found) >= loss(best):
            break
        best = found
    return best


def _noises(units: Sequence[FitUnit]) -> Iterator[float]:
    """From the most that there can be to the least, such that prices are a step apart."""
    noise = sum(max(option.swaps for option in unit.options) for unit in units)
    least = min((option.swaps for unit in units for option in unit.options if option.swaps), default=math.inf)
    while noise >= least:
        yield noise
        noise /= PRICE_STEP**2


def _priced(unit: FitUnit, price: float) -> FitUnit:
    options = (replace(option, loss=option.loss + price * option.swaps) for option in unit.options)
    return replace(unit, options=tuple(options))
