"""One option of each unit, at the least total loss within a budget: the multiple-choice knapsack problem, exactly.

U units. A first choice follows the units' convex hulls (Lagrange's relaxation): the step that saves most for its loss
first. Then all units are gone through one after the other, keeping what no other partial choice beats in both loss and
cost, as long as it can still become better than the best choice known (Pisinger, "A minimal algorithm for the
multiple-choice knapsack problem", 1995, has the bound and the idea of few survivors).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

Floats: TypeAlias = NDArray[np.float64]

TOLERANCE = 1e-9
"""Of the loss: partial choices that cannot win more than this share are dropped."""


@dataclass(frozen=True)
class Option:
    """One way to have a unit."""

    loss: float
    cost: float
    """In whatever the budget is of."""


def choose(units: Sequence[Sequence[Option]], budget: float) -> tuple[int, ...] | None:
    """The number of the option that each unit gets; None where even the cheapest ones are beyond the budget.

    Equal inputs give equal choices: of options alike in loss and cost the first is taken.
    """
    if not units:
        return () if budget >= 0 else None
    fronts = [_front(options) for options in units]
    hulls = [_hull(options, front) for options, front in zip(units, fronts, strict=True)]
    known = _along_hulls(units, hulls, budget)
    if known is None:
        return None
    best = sum(options[number].loss for options, number in zip(units, known, strict=True))
    return _search(units, fronts, hulls, budget, best) or known


def _front(options: Sequence[Option]) -> list[int]:
    """Options that no other one beats, the cheapest first."""
    found: list[int] = []
    for number in sorted(range(len(options)), key=lambda n: (options[n].cost, options[n].loss, n)):
        if not found or options[number].loss < options[found[-1]].loss:
            found.append(number)
    return found


def _hull(options: Sequence[Option], front: Sequence[int]) -> list[int]:
    """Of those the ones on the lower convex hull of loss over cost."""
    hull: list[int] = []
    for number in front:
        while len(hull) > 1 and _gain(options, hull[-2], hull[-1]) <= _gain(options, hull[-1], number):
            hull.pop()
        hull.append(number)
    return hull


def _gain(options: Sequence[Option], cheap: int, dear: int) -> float:
    """Loss saved for each unit of cost."""
    a, b = options[cheap], options[dear]
    return (a.loss - b.loss) / (b.cost - a.cost)


def _along_hulls(
    units: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]], budget: float
) -> tuple[int, ...] | None:
    """From the cheapest options up, the best gain first, leaving out steps that do not fit."""
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(options[number].cost for options, number in zip(units, chosen, strict=True))
    if left < 0:
        return None
    steps = [
        (-_gain(units[unit], hull[place], hull[place + 1]), unit, place)
        for unit, hull in enumerate(hulls)
        for place in range(len(hull) - 1)
    ]
    for _, unit, place in sorted(steps):
        before, after = hulls[unit][place], hulls[unit][place + 1]
        more = units[unit][after].cost - units[unit][before].cost
        if chosen[unit] == before and more <= left:
            chosen[unit] = after
            left -= more
    return tuple(chosen)


@dataclass(frozen=True, eq=False)
class _Rest:
    """The least loss that some units can have, as a function of what they cost: a bound, by their hulls."""

    costs: Floats
    losses: Floats

    def least(self, budgets: Floats) -> Floats:
        """Infinite where not even the cheapest options fit."""
        found = np.interp(budgets, self.costs, self.losses)
        found[budgets < self.costs[0]] = np.inf
        return found


def _rests(units: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]]) -> list[_Rest]:
    """Entry u is of the units from u on."""
    cost = loss = 0.0
    steps: list[tuple[float, float, float]] = []
    found = [_Rest(np.zeros(1), np.zeros(1))]
    for options, hull in zip(reversed(units), reversed(hulls), strict=True):
        cost, loss = cost + options[hull[0]].cost, loss + options[hull[0]].loss
        for cheap, dear in pairwise(hull):
            more = options[dear].cost - options[cheap].cost
            steps.append((-_gain(options, cheap, dear), more, options[dear].loss - options[cheap].loss))
        steps.sort()
        changes = np.array([(more, less) for _, more, less in steps]).reshape(-1, 2)
        found.append(
            _Rest(
                cost + np.concatenate([[0.0], np.cumsum(changes[:, 0])]),
                loss + np.concatenate([[0.0], np.cumsum(changes[:, 1])]),
            )
        )
    return found[::-1]


def _search(
    units: Sequence[Sequence[Option]],
    fronts: Sequence[Sequence[int]],
    hulls: Sequence[Sequence[int]],
    budget: float,
    best: float,
) -> tuple[int, ...] | None:
    """A choice that is better than ``best``, or None."""
    limit = best - TOLERANCE * abs(best)
    costs, losses = np.zeros(1), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for options, front, rest in zip(units, fronts, _rests(units, hulls)[1:], strict=True):
        own = np.array([(options[number].cost, options[number].loss) for number in front])
        all_costs = (costs[:, None] + own[None, :, 0]).ravel()
        all_losses = (losses[:, None] + own[None, :, 1]).ravel()
        order = np.lexsort((all_losses, all_costs))
        behind = np.concatenate([[np.inf], np.minimum.accumulate(all_losses[order])[:-1]])
        order = order[all_losses[order] < behind]
        bounds = all_losses[order] + rest.least(budget - all_costs[order])
        kept = order[bounds < limit]
        if not len(kept):
            return None
        costs, losses = all_costs[kept], all_losses[kept]
        steps.append((kept // len(front), np.array(front)[kept % len(front)]))
    place = int(np.argmin(losses))
    chosen: list[int] = []
    for parents, numbers in reversed(steps):
        chosen.append(int(numbers[place]))
        place = int(parents[place])
    return tuple(reversed(chosen))
