"""From logits to the next token, in the order and with the meaning of transformers' logits processors."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.runtime.logprobs import token_logprobs
from moec.runtime.randoms import uniform

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.runtime.logprobs import TokenLogprobs


_LIKELY = 1024


@dataclass(frozen=True)
class Sampling:
    """How to choose a token; values are in range (`moec.runtime.requests.checks` checks what users pass)."""

    do_sample: bool = False
    """False: the best token, and temperature, top_k and top_p are not applied."""
    temperature: float = 1.0
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that were generated; prompts do not count."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that a token was generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens and what is added to their logits."""

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters how often a token was generated."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Sampler:
    """Chooses the tokens of one sequence, with random numbers of its own: a batch cannot change them.

    The n-th token takes the n-th number of `moec.runtime.randoms.uniform` for the seed, on every device.

    Args:
        sampling: how to choose.
        prompt: tokens that count as already seen for ``repetition_penalty``.
        seed: of the random numbers, modulo 2**64; ``None`` takes one from the system.
        top_logprobs: how many of the likeliest tokens `logprobs` names; ``None``: there are no `logprobs`.

    Attributes:
        logprobs: of the token that was chosen last, where they are wanted.
    """

    def __init__(
        self, sampling: Sampling, prompt: tuple[int, ...], seed: int | None, top_logprobs: int | None = None
    ) -> None:
        self.sampling = sampling
        self.logprobs: TokenLogprobs | None = None
        self._top_logprobs = top_logprobs
        self._counts: dict[int, int] = {}
        self.seed = secrets.randbits(64) if seed is None else seed % 2**64
        self.drawn = 0
        self._seen: dict[int, None] | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = dict.fromkeys(prompt)

    @property
    def needs_logits(self) -> bool:
        """Whether only the host can choose, which reads all logits for it."""
        return self._top_logprobs is not None or self.sampling.counts_tokens or bool(self.sampling.logit_bias)

    def choose(
        self, logits: NDArray[np.float32], forbidden: frozenset[int] = frozenset(), forced: int | None = None
    ) -> int:
        """The next token from its logits float32 ``[V]``, not one of ``forbidden``, or ``forced`` whatever they are."""
        token = self._choose(logits, forbidden) if forced is None else forced
        if self._top_logprobs is not None:
            self.logprobs = token_logprobs(logits, token, self._top_logprobs)
        self.accept(token)
        return token

    def _choose(self, logits: NDArray[np.float32], forbidden: frozenset[int]) -> int:
        scores = logits
        if self.sampling.logit_bias:
            scores = add_bias(scores, self.sampling.logit_bias)
        if self._seen is not None:
            scores = penalize(scores, list(self._seen), self.sampling.repetition_penalty)
        if self._counts:
            scores = penalize_counts(scores, self._counts, self.sampling)
        if forbidden:
            scores = scores.copy() if scores is logits else scores
            scores[list(forbidden)] = -np.inf
        if not self.sampling.do_sample:
            return int(scores.argmax())
        ids, probabilities = candidates(scores, self.sampling)
        return int(ids[draw(probabilities, uniform(self.seed, self.drawn))])

    def accept(self, token: int) -> None:
        """Note a token that was chosen, here or by a GPU."""
        self.drawn += 1
        if self._seen is not None:
            self._seen[token] = None
        if self.sampling.counts_tokens:
            self._counts[token] = self._counts.get(token, 0) + 1


def add_bias(logits: NDArray[np.float32], bias: tuple[tuple[int, float], ...]) -> NDArray[np.float32]:
    """Logits with ``bias`` added to those of its tokens."""
    scores = logits.copy()
    tokens, values = zip(*bias, strict=True)
    np.add.at(scores, np.array(tokens), np.array(values, np.float32))
    return scores


def penalize_counts(
    logits: NDArray[np.float32], counts: dict[int, int], sampling: Sampling
) -> NDArray[np.float32]:
    """Subtract what the presence and the frequency of generated tokens cost (OpenAI's API reference)."""
    scores = logits.copy()
    times = np.fromiter(counts.values(), np.float32, len(counts))
    cost = np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * times
    scores[list(counts)] -= cost
    return scores


def penalize(logits: NDArray[np.float32], seen: list[int], penalty: float) -> NDArray[np.float32]:
    """Divide positive logits of seen tokens by ``penalty``, multiply negative ones (Keskar et al., CTRL)."""
    factor = np.float32(penalty)
    scores = logits.copy()
    chosen = scores[seen]
    scores[seen] = np.where(chosen < 0, chosen * factor, chosen / factor)
    return scores


def candidates(
    scores: NDArray[np.float32], sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that temperature, top_k and top_p leave, and their probabilities.

    Args:
        scores: float32 ``[V]``.
        sampling: its ``do_sample`` is not looked at.

    Returns:
        Token ids ``[N]``, rising, and float64 probabilities ``[N]`` that sum to 1.
    """
    scores = scores / np.float32(sampling.temperature)
    if 0 < sampling.top_k < scores.size:
        threshold = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        ids = np.flatnonzero(scores >= threshold)
    else:
        ids = np.arange(scores.size)
    probabilities = _softmax(scores[ids])
    if sampling.top_p < 1.0:
        kept = _nucleus(probabilities, sampling.top_p)
        ids, probabilities = ids[kept], probabilities[kept]
        probabilities = probabilities / probabilities.sum()
    return ids, probabilities


def _nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Places, rising, that stay when the least likely tokens, up to a mass of ``1 - top_p``, are cut.

    Of equally likely ones the first are cut first. About the likeliest 1024 are enough in nearly all cases, and
    sorting a whole vocabulary takes tens of milliseconds.
    """
    places, below = np.arange(probabilities.size), 0.0
    if probabilities.size > _LIKELY:
        least = np.partition(probabilities, -_LIKELY)[-_LIKELY]
        likely = np.flatnonzero(probabilities >= least)
        rest = 1.0 - float(probabilities[likely].sum())
        if rest <= 1.0 - top_p:
            places, below = likely, rest
    order = places[np.argsort(probabilities[places], kind="stable")]
    kept = below + np.cumsum(probabilities[order]) > 1.0 - top_p
    kept[-1] = True
    return np.sort(order[kept])


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = scores.astype(np.float64)
    np.exp(wide - wide.max(), out=wide)
    wide /= wide.sum()
    return wide


def draw(probabilities: NDArray[np.float64], number: float) -> int:
    """The first place up to which the probabilities sum up to more than the part ``number``, in [0, 1), of them."""
    bounds = np.cumsum(probabilities)
    place = np.searchsorted(bounds, number * bounds[-1], side="right")
    return min(int(place), probabilities.size - 1)
