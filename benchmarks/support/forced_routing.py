"""Routing that is forced: each decoding step's choices are written to the GPU before it, in place of the router's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from moec.planning.routing.synthetic import TOPICAL, zipf_traces
from moec.runtime.device import View

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from moec.artifacts.layout.footprint import Footprint
    from moec.runtime import Model
    from moec.runtime.chain.section import ChainSection
    from moec.runtime.device import Call
    from moec.runtime.experts.calls import ExpertWork


class ForcedRouting:
    """While it is open, decoding steps of one token choose ``choices`` ``[N, layers, K]``; ``None``: what they like.

    Steps do not run ahead of their tokens meanwhile, so that each can be timed and counted by itself. The weights of
    the choices stay the router's own. The memory for them is outside the model's budget.

    ``guesses``, float32 ``[N, layers, E]``, are forced as the scores by which experts are brought ahead: with random
    weights no router guesses anything.
    """

    def __init__(
        self, model: Model, choices: NDArray[np.int64] | None, guesses: NDArray[np.float32] | None = None
    ) -> None:
        executor: Any = model._executor
        self._executor = executor
        self._choices, self._guesses = choices, guesses
        self._sections = [ForcedSection(section) for section in executor.sections]

    def __enter__(self) -> Self:
        self._executor.can_run_ahead = lambda _: False
        for section in self._sections:
            section.begin(self._choices, guessed=self._guesses is not None)
        return self

    def __exit__(self, *_: object) -> None:
        del self._executor.can_run_ahead
        for section in self._sections:
            section.end(forced=self._choices is not None)

    def step(self, number: int) -> None:
        """Before the step ``number``."""
        for section in self._sections:
            if self._choices is not None:
                section.choose(self._choices[number])
            if self._guesses is not None:
                section.guess(self._guesses[number])


class ForcedSection:
    """What one GPU chooses: the layers of its section of the chain."""

    def __init__(self, section: ChainSection) -> None:
        self._section, self._first, self._address = section, section.experts_before, 0
        self._device: Any = section.device
        self._experts: Any = section.experts
        self._ahead = getattr(self._experts, "ahead", None)

    def begin(self, choices: NDArray[np.int64] | None, *, guessed: bool) -> None:
        """Have steps choose what `choose` writes, where there are ``choices``, and guess what `guess` writes."""
        if not guessed:
            self._ahead = None
        if self._ahead is not None:
            self._score = self._ahead._score
            self._ahead._score = lambda *_: None
        if choices is not None:
            layers, chosen = choices.shape[1:]
            self._device.enter()
            self._address = self._device.driver.allocate(layers * _stride(chosen))
            self._original: Callable[..., list[Call]] = self._experts.calls
            self._experts.calls = self._calls
            self._section.forget()

    def end(self, *, forced: bool) -> None:
        """Let it choose and guess by itself again."""
        if self._ahead is not None:
            self._ahead._score = self._score
        if forced:
            del self._experts.calls
            self._section.forget()
            self._device.synchronize()
            self._device.driver.free(self._address)

    def choose(self, choices: NDArray[np.int64]) -> None:
        """Write the choices of all layers of the model ``[layers, K]``, those of others too."""
        layers, chosen = choices.shape
        image = np.zeros((layers, _stride(chosen) // 8), np.int64)
        image[:, :chosen] = choices
        self._device.write(self._address, image)

    def guess(self, guesses: NDArray[np.float32]) -> None:
        """Write the scores of all layers ``[layers, E]``."""
        if self._ahead is not None:
            for each in self._ahead.plan.layers:
                scores = np.ascontiguousarray(guesses[self._first + each.layer])
                self._device.write(self._ahead.scores(each.layer, 1).address, scores)

    def _calls(self, work: ExpertWork) -> list[Call]:
        hidden, index, weight, out = work.views
        if index.shape[0] == 1:
            layer = self._first + work.layer
            index = View(self._address + layer * _stride(index.shape[1]), "int64", index.shape)
        return self._original(work._replace(views=(hidden, index, weight, out)))


def _stride(chosen: int) -> int:
    """Bytes of a layer's choices, a multiple of 64."""
    return 64 * -(-chosen // 8)


def zipf_choices(facts: Footprint, exponent: float, steps: int) -> NDArray[np.int64]:
    """``[steps, layers, K]``: each layer's experts in an order of its own, the n-th as likely as ``n ** -exponent``.

    Tokens are independent of each other; a token's choices are drawn without replacement. Layers have the same K.
    """
    random = np.random.default_rng(round(exponent * 1000))
    chosen = np.empty((steps, len(facts.layers), facts.layers[0].top_k), np.int64)
    for number, layer in enumerate(facts.layers):
        assert layer.top_k == chosen.shape[2]
        logits = -exponent * np.log(np.arange(1, layer.experts + 1))[random.permutation(layer.experts)]
        # Gumbel's trick: the K largest of these are K draws without replacement.
        noisy = logits + random.gumbel(size=(steps, layer.experts))
        chosen[:, number] = np.argsort(-noisy, axis=1)[:, : layer.top_k]
    return chosen


def topical_choices(facts: Footprint, steps: int) -> NDArray[np.int64]:
    """``[steps, layers, K]`` as `moec.planning.routing.synthetic.TOPICAL` has them."""
    shapes = [(layer.experts, layer.top_k) for layer in facts.layers]
    traces = zipf_traces(shapes, steps, TOPICAL)
    return np.stack([layer.chosen.astype(np.int64) for layer in traces.layers], axis=1)


def drawn_guesses(facts: Footprint, choices: NDArray[np.int64], recall: float) -> NDArray[np.float32]:
    """Scores ``[steps, layers, E]`` whose K best of each layer are a guess of ``choices`` ``[steps, layers, K]``.

    Each chosen expert is guessed with the probability ``recall``; in place of the others come any experts, all as
    likely. The order of the guesses says nothing.
    """
    random = np.random.default_rng(7)
    experts = max(layer.experts for layer in facts.layers)
    steps, layers, top_k = choices.shape
    scores = random.random((steps, layers, experts), np.float32)
    chosen = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(chosen, choices, True, axis=2)
    known = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(known, choices, random.random(choices.shape) < recall, axis=2)
    scores[chosen] -= 4
    scores[known] += 8
    wrong = np.argsort(-np.where(chosen, -1, scores), axis=2)[..., :top_k]
    wanted = np.arange(top_k) < top_k - known.sum(axis=2)[..., None]
    lifted = np.zeros(scores.shape, np.float32)
    np.put_along_axis(lifted, wrong, np.where(wanted, np.float32(4), np.float32(0)), axis=2)
    return scores + lifted
