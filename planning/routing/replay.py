"""Traces replayed under a policy, for every number of slots at once.

All policies are stack algorithms (Mattson, Gecsei, Slutz, Traiger: Evaluation techniques for storage hierarchies, IBM
Systems Journal 1970): the key that decides who leaves does not depend on the number of slots, so a cache of c + 1
slots always holds what one of c slots holds. One pass then gives, for each chosen expert, the least number of slots
with which it is a hit: its stack distance. Hit rates that grow with the number of slots follow by construction.

Layers of one shape are replayed together, token by token: the work of a token is a few numpy operations on ``[L, E]``.

Dimension names: L layers, N tokens, K chosen experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moec.artifacts.traces import repeats
from moec.planning.policies import EXPERT_BITS, count, experts_of, initial_state, keys

if TYPE_CHECKING:
    import numpy.typing as npt

    from moec.artifacts.schedule import Admission, Policy
    from moec.artifacts.traces import Traces
    from moec.planning.policies import Integers

_LOCKED = np.int64(1) << 61
"""Above every key. An expert that the token chose has this key, plus one, plus its number."""
_NEVER = np.int64(1) << 44
"""A token that does not come."""


class Keys(Protocol):
    """Keys of experts while a trace is replayed."""

    def after(self, token: int, chosen: Integers) -> Integers:
        """Count that ``token`` chose ``chosen`` ``[L, K]``, and give the keys that decide who leaves, ``[L, E]``."""


class PolicyKeys:
    """Those of a policy that can be scheduled."""

    def __init__(self, policy: Policy, use_shares: npt.ArrayLike) -> None:
        self._policy = policy
        self._state = initial_state(policy, np.atleast_2d(np.asarray(use_shares)))
        self._layers = np.arange(len(self._state.last))[:, None]

    def after(self, token: int, chosen: Integers) -> Integers:
        """See `Keys.after`."""
        del token
        count(self._policy, self._state, (self._layers, chosen), np.ones_like(chosen), 1)
        return keys(self._policy, self._state)


class OptimalKeys:
    """Belady's optimum (1966), which needs the future: the expert whose next use is farthest off leaves."""

    def __init__(self, chosen: Integers, experts: int) -> None:
        layers, tokens, width = chosen.shape
        self._experts, self._layers = np.arange(experts), np.arange(layers)[:, None]
        self._next = np.full((layers, experts), _NEVER)
        # following[l, t, k]: when the expert that token t chose is chosen again.
        self._following = np.empty((layers, tokens, width), np.int64)
        for token in range(tokens - 1, -1, -1):
            self._following[:, token] = self._next[self._layers, chosen[:, token]]
            self._next[self._layers, chosen[:, token]] = token

    def after(self, token: int, chosen: Integers) -> Integers:
        """See `Keys.after`."""
        self._next[self._layers, chosen] = self._following[:, token]
        least: Integers = np.array((1 << EXPERT_BITS) - 1 - self._experts)
        return ((_NEVER - self._next) << EXPERT_BITS) | least


def stack_distances(
    policy: Policy, chosen: npt.ArrayLike, order: npt.ArrayLike, use_shares: npt.ArrayLike
) -> Integers:
    """With c slots, seeded with ``order[:, :c]``, a choice hits where its distance is at most c.

    Args:
        policy: who leaves.
        chosen: ``[L, N, K]`` experts.
        order: ``[L, E]``: all experts, those that are there to begin with first.
        use_shares: ``[L, E]``, by expert number.

    Returns:
        Distances ``[L, N, K]``, 1..E; 0 for an expert that comes before in its row.
    """
    return replay(PolicyKeys(policy, use_shares), chosen, order, policy.admission)


def optimal_distances(
    chosen: npt.ArrayLike, order: npt.ArrayLike, admission: Admission = "always"
) -> Integers:
    """As ``stack_distances``, under Belady's optimum.

    With ``always`` it is the best that a cache can do which lets every missed expert in, with ``better`` the best of
    all: there an expert may give way to another one that its own token chose.
    """
    index = np.asarray(chosen, np.int64)
    source = OptimalKeys(index, np.asarray(order).shape[1])
    return replay(source, index, order, admission, locks=admission == "always")


def stack_places(
    policy: Policy, chosen: npt.ArrayLike, order: npt.ArrayLike, use_shares: npt.ArrayLike
) -> Integers:
    """As ``stack_distances``, but of every expert before each token, ``[L, N, E]``, from 0: below c it has a slot."""
    index, stack = np.asarray(chosen), np.asarray(order)
    places = np.zeros((*index.shape[:2], stack.shape[1]), np.int64)
    replay(PolicyKeys(policy, use_shares), index, stack, policy.admission, places)
    return places


def replay(
    source: Keys,
    chosen: npt.ArrayLike,
    order: npt.ArrayLike,
    admission: Admission,
    all_places: Integers | None = None,
    *,
    locks: bool = True,
) -> Integers:
    """See ``stack_distances``; ``source`` gives the keys. ``all_places`` is filled in as by ``stack_places``.

    ``locks``: whether what a token chose stays while it brings in the others that it chose.
    """
    index, stack = np.asarray(chosen, np.int64), np.array(order, np.int64)
    distances = np.zeros(index.shape, np.int64)
    layers, places = np.arange(len(stack))[:, None], np.arange(stack.shape[1])[None]
    place_of = np.empty_like(stack)
    for token in range(index.shape[1]):
        experts = index[:, token]
        place_of[layers, stack] = places
        distances[:, token] = place_of[layers, experts] + 1
        if all_places is not None:
            all_places[:, token] = place_of
        found = source.after(token, experts)
        own = found[layers, experts]
        held = _LOCKED + 1 + experts if locks else own
        found[layers, experts] = held
        stack = _brought_in(stack, found[layers, stack], held, own if admission == "better" else None)
    distances[repeats(index)] = 0
    return distances


def _brought_in(stack: Integers, stack_keys: Integers, held: Integers, own: Integers | None) -> Integers:
    """The stacks after a token: what a cache of c slots then holds is ``stack[:, :c]``.

    Whoever has the least key in a cache of one slot leaves it, stays in a larger one that holds a lesser one, and
    so on downwards: at every place the greater of two keys stays, and the lesser goes on.

    Args:
        stack: ``[L, E]`` experts.
        stack_keys: ``[L, E]``: their keys, in the same order.
        held: ``[L, K]``: the keys that those have which are brought in, one after the other.
        own: ``[L, K]``: the key with which each comes to the first place; ``None``: it always takes a slot.
    """
    places = np.arange(stack.shape[1])[None]
    for number in range(held.shape[1]):
        key = held[:, number : number + 1]
        at = (stack_keys == key).argmax(axis=1)[:, None]
        first = np.full_like(key, _LOCKED) if own is None else own[:, number : number + 1]
        going = np.minimum.accumulate(np.concatenate([first, stack_keys[:, :-1]], axis=1), axis=1)
        moved = np.where(places < at, np.maximum(stack_keys, going), stack_keys)
        moved = np.where(places == at, going, moved)
        stack_keys = np.where(moved == first, key, moved)
    unlocked = stack_keys < _LOCKED
    brought: Integers = np.where(unlocked, experts_of(stack_keys), stack_keys - _LOCKED - 1)
    return brought


@dataclass(frozen=True, eq=False)
class LayerReplay:
    """One MoE layer's replay."""

    distances: Integers
    """``[N, K]``: the least number of slots with which the choice is a hit; 0 where its row has it before."""
    ranks: Integers
    """``[N, K]``: the chosen expert's place in the profile's order."""
    experts: int

    @cached_property
    def curve(self) -> npt.NDArray[np.float64]:
        """Hit rate with 0..E slots, ``[E + 1]``."""
        return hit_curve(self.distances, self.experts)


@dataclass(frozen=True, eq=False)
class Replay:
    """All MoE layers under one policy."""

    policy: Policy | None
    """``None``: Belady's optimum."""
    layers: tuple[LayerReplay, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """MoE layers of one shape."""

    numbers: tuple[int, ...]
    """Their ordinals, L of them."""
    chosen: Integers
    """``[L, N, K]``."""
    experts: int


def hit_curve(distances: Integers, experts: int) -> npt.NDArray[np.float64]:
    """Hit rate with 0..E slots, ``[E + 1]``, from stack distances of any shape."""
    counts = np.bincount(distances.ravel(), minlength=experts + 1)[: experts + 1]
    return np.cumsum(counts) / max(1, distances.size)


def group_layers(traces: Traces, tokens: Integers) -> tuple[Group, ...]:
    """The choices of ``tokens`` (numbers of traced tokens), layers of the same shape together."""
    alike: dict[tuple[int, int], list[int]] = {}
    for number, layer in enumerate(traces.layers):
        alike.setdefault((layer.experts, layer.chosen.shape[1]), []).append(number)
    return tuple(
        Group(
            tuple(numbers), np.stack([traces.layers[n].chosen[tokens] for n in numbers]).astype(np.int64), E
        )
        for (E, _), numbers in alike.items()
    )


def use_shares(chosen: Integers, experts: int) -> npt.NDArray[np.float64]:
    """Share of tokens that chose each expert, ``[L, E]``, by expert number, from choices ``[L, N, K]``."""
    counts = [np.bincount(layer[~repeats(layer)], minlength=experts) for layer in chosen]
    shares: npt.NDArray[np.float64] = np.stack(counts) / max(1, chosen.shape[1])
    return shares


def by_use(shares: npt.NDArray[np.float64]) -> Integers:
    """Experts by their shares ``[.., E]``, the most used first, of equal ones the lower number."""
    order: Integers = np.argsort(-shares, axis=-1, kind="stable")
    return order


def ranks_of(chosen: Integers, order: Integers) -> Integers:
    """The places of choices ``[L, N, K]`` in the order ``[L, E]`` of all experts."""
    ranks: Integers = np.take_along_axis(np.argsort(order, axis=1)[:, None], chosen, axis=2)
    return ranks
