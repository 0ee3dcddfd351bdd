"""Experts of the next MoE layer, guessed on the GPU at this one, of which pieces are brought while the link is free.

At a layer the branch guesses for the next one, beside the fetch of the layer's own experts; when that is over, it
brings pieces until the next layer knows its choices.

E experts, H hidden size, T tokens, K chosen experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.words import ahead as words
from moec.runtime.device import PackedCall, View
from moec.runtime.devices.cuda.branch import STAGE, Branch
from moec.runtime.experts.prefetch import transition_votes
from moec.runtime.routing.early_router import early_routers

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from numpy.typing import NDArray

    from moec.artifacts.files.bundle import Bundle
    from moec.runtime.device import Call
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.modules.module import CudaFunctions
    from moec.runtime.devices.cuda.offload.host_tier import HostTier
    from moec.runtime.devices.cuda.offload.states import LayerStates
    from moec.runtime.devices.cuda.uploading.weights import ResidentWeights
    from moec.runtime.experts.ahead import AheadPlan, LayerAhead
    from moec.runtime.stats import PrefetchStats

GUESSED, BROUGHT = 0, 1
"""Marks of the branch."""
COUNTERS = (words.CHOSEN, words.RIGHT, words.SEEN, words.EXACT, words.FETCHED)
"""One behind the other."""


class ExpertsAhead:
    """Makes the calls of guesses, and reads what the GPU counted.

    Args:
        device: the GPU.
        bundle: the model.
        functions: of the GPU's module; it has those of `moec.artifacts.words.ahead`.
        plan: what is guessed, by what, how much is brought.
        states: of all layers.
        tier: the experts in host memory; others are not brought ahead.
        weights: the model's own.

    Raises:
        BudgetError: there is no memory for it.
    """

    def __init__(
        self,
        device: CudaDevice,
        bundle: Bundle,
        functions: CudaFunctions,
        plan: AheadPlan,
        states: LayerStates,
        tier: HostTier,
        weights: ResidentWeights,
    ) -> None:
        self.plan = plan
        self._functions = functions
        """Kept as long as any of them: a library is loaded once."""
        self._device, self._states, self._branch = device, states, Branch(device, marks=2)
        self._model = bundle.model
        self._layers = {each.layer: each for each in plan.layers}
        self._after = {each.before: each for each in plan.layers}
        self._staging = device.allocate(plan.staging_bytes)
        self._block = device.hold(self._image(bundle, tier))
        self._routers = {
            each.layer: weights.dense[each.router] for each in plan.layers if each.router is not None
        }
        by_router = plan.source == "router"
        self._score = functions.get(words.SCORE_EARLY if by_router else words.SCORE_VOTES)
        self._guess, self._check = functions.get(words.GUESS), functions.get(words.CHECK)
        self._bring = functions.get(words.BRING)
        self._seen = np.zeros(len(COUNTERS), np.int64)
        device.unfinished.repair_with(self._restart)

    def takes(self, index: View) -> bool:
        """Whether a step with these choices ``[T, K]`` is guessed for."""
        tokens, chosen = index.shape
        return tokens <= words.MOST_TOKENS and tokens * chosen <= words.MOST_GUESSED

    def before(self, layer: int, index: View) -> list[Call]:
        """Before a layer's misses are known: what was brought for it is there, and the guess is checked.

        The check is a kernel that waits for all before it (the others begin early, see decision 12): so does what comes
        behind it.
        """
        own = self._layers.get(layer)
        if own is None:
            return []
        arguments = self._device.tensor(index), self._device.tensor(self._words(own))
        return [self._branch.join(BROUGHT), PackedCall(STAGE, self._check, arguments)]

    def guess(self, layer: int, hidden: View, index: View) -> list[Call]:
        """Beside a layer's fetch: guess the next layer's experts."""
        after = self._after.get(layer)
        if after is None:
            return []
        branch, tensor = self._branch, self._device.tensor
        scores = self.scores(after.layer, index.shape[0])
        source = hidden if self.plan.source == "router" else index
        state = self._states.state(after.layer)
        return [
            branch.fork(),
            branch.call(self._score, *map(tensor, (source, self._weight(after), scores))),
            branch.call(self._guess, *map(tensor, (scores, state, self._words(after)))),
            branch.mark(GUESSED),
        ]

    def bring(self, layer: int) -> list[Call]:
        """Behind a layer's fetch: bring pieces for the next one."""
        after = self._after.get(layer)
        if after is None:
            return []
        state = self._device.tensor(self._states.state(after.layer))
        return [self._branch.fork(), self._branch.call(self._bring, state), self._branch.mark(BROUGHT)]

    def behind(self, layer: int) -> list[Call]:
        """Behind a layer: its values are not read any more."""
        return [self._branch.join(GUESSED)] if layer in self._after else []

    def scores(self, layer: int, tokens: int) -> View:
        """float32 ``[T, E]``: by what a layer's experts are guessed."""
        place, experts = self._layers[layer].scores, self._model.experts[layer].experts
        return View(self._block.address + place, "float32", (tokens, experts))

    def count(self, stats: PrefetchStats, taken: int) -> None:
        """Add what the GPU has counted since the last time, when fetches took ``taken`` bytes of what was brought."""
        counters = self._counters()
        chosen, right, seen, exact, fetched = (counters - self._seen).tolist()
        self._seen = counters
        stats.chosen += chosen
        stats.right += right
        stats.tokens += seen
        stats.exact += exact
        stats.fetched_bytes += fetched
        stats.wasted_bytes += fetched - taken

    def _counters(self) -> NDArray[np.int64]:
        """What was counted, once all calls before are finished."""
        total = np.zeros(len(COUNTERS), np.int64)
        for each in self.plan.layers:
            address = self._words(each).address + 8 * COUNTERS[0]
            total += self._device.read(View(address, "int64", total.shape))
        return total

    def _restart(self) -> None:
        """After a step that ended in its middle: what was guessed may not have been brought."""
        self._branch.synchronize()
        self._states.forget_ahead()
        for each in self.plan.layers:
            self._device.write(self._words(each).address + 8 * words.TOKENS, np.zeros(1, np.int64))

    def _words(self, each: LayerAhead) -> View:
        size = words.ahead_words(self._model.experts[each.layer].experts)
        return View(self._block.address + each.words, "int64", (size,))

    def _weight(self, each: LayerAhead) -> View:
        experts, before = self._model.experts[each.layer].experts, self._model.experts[each.before].experts
        own = each.weight
        address = self._routers[each.layer] if own is None else self._block.address + own
        if self.plan.source == "router":
            return View(address, "bfloat16", (experts, self._model.hidden_size))
        return View(address, "float32", (before, experts))

    def _image(self, bundle: Bundle, tier: HostTier) -> NDArray[np.uint8]:
        """The block as it begins."""
        plan = self.plan
        image = np.zeros(plan.block_bytes, np.uint8)
        weight_of = _weights(bundle, plan)
        for each in plan.layers:
            own = bundle.model.experts[each.layer]
            block = np.zeros(words.ahead_words(own.experts), np.int64)
            block[[words.BOUND, words.STAGING, words.TOP_K]] = plan.pieces, self._staging.address, own.top_k
            block[words.HOMES : words.HOMES + own.experts] = tier.homes[each.layer]
            _put(image, each.words, block)
            if each.weight is not None:
                _put(image, each.weight, weight_of(each))
        return image


def _weights(bundle: Bundle, plan: AheadPlan) -> Callable[[LayerAhead], NDArray[Any]]:
    if plan.source == "transitions":
        votes = transition_votes(bundle.schedule.profile)
        return lambda each: votes[each.before]
    routers = early_routers(bundle, {each.layer for each in plan.layers if each.weight is not None})

    def router(each: LayerAhead) -> NDArray[Any]:
        weight = routers[each.layer]
        assert weight is not None
        # Cut to 16 bits: a guess needs no rounding.
        return (weight.view(np.uint32) >> 16).astype(np.uint16)

    return router


def _put(image: NDArray[np.uint8], place: int, array: NDArray[Any]) -> None:
    data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    image[place : place + data.size] = data
