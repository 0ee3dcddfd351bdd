"""A request and the sequence that it becomes inside the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from moec.runtime.engine.page_names import PageNames
from moec.runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from moec.runtime.engine.pages import Lease
    from moec.runtime.logprobs import TokenLogprobs

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """What to generate. Checked by `Engine.add`."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    min_new_tokens: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    """Of this sequence's own random numbers; ``None`` takes one from the system."""
    source: tuple[int, ...] = ()
    """What an encoder reads; the prompt is then the decoder's."""
    first_token: int | None = None
    """Forced after a prompt of one token."""
    last_token: int | None = None
    """Forced where ``max_new_tokens`` is reached."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens each `TokenOutput` names, with logarithms of their probabilities; ``None``: it
    has none of either. On a GPU the host then chooses, for all that run with it."""
    whole_prompt: bool = False
    """Run all of the prompt, whatever pages of the cache hold its beginning already."""


class Sequence:
    """A request under way: its tokens so far, and how many of them the cache holds.

    Attributes:
        id: arrival order within the engine.
        tokens: prompt and continuation.
        computed: how many of ``tokens`` are in the cache.
        lease: row and pages while it runs, ``None`` while it waits or is finished.
        names: of its pages.
        reused: how many tokens of its prompt were in the cache when it first joined; ``None`` before that.
        finished: why it ended, ``None`` before that.
    """

    __slots__ = ("computed", "finished", "id", "lease", "names", "request", "reused", "sampler", "tokens")

    def __init__(self, identity: int, request: Request) -> None:
        self.id = identity
        self.request = request
        self.tokens = list(request.prompt)
        self.computed = 0
        self.lease: Lease | None = None
        self.finished: FinishReason | None = None
        self.names = PageNames(self.tokens)
        self.reused: int | None = None
        self.sampler = Sampler(request.sampling, request.prompt, request.seed, request.top_logprobs)

    @property
    def pending(self) -> int:
        """Tokens that the cache does not hold yet; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def new_tokens(self) -> list[int]:
        """The continuation so far."""
        return self.tokens[len(self.request.prompt) :]

    def extend(self, token: int) -> None:
        """Append a chosen token and note whether it ends the sequence."""
        self.tokens.append(token)
        if token in self.request.eos_token_ids:
            self.finished = "stop"
        elif self.left <= 0:
            self.finished = "length"

    @property
    def left(self) -> int:
        """Tokens that it may still get; 0 at ``max_new_tokens``."""
        return len(self.request.prompt) + self.request.max_new_tokens - len(self.tokens)

    def forbidden(self, ahead: int = 0) -> frozenset[int]:
        """Tokens that may not come next: end tokens while fewer than ``min_new_tokens`` are there.

        Args:
            ahead: tokens that were chosen and are not in ``tokens`` yet.
        """
        short = len(self.tokens) + ahead - len(self.request.prompt) < self.request.min_new_tokens
        return self.request.eos_token_ids if short else frozenset()

    def forced(self, ahead: int = 0) -> int | None:
        """The token that comes next whatever the logits say; ``ahead`` as for `forbidden`."""
        request = self.request
        if request.last_token is not None and self.left - ahead == 1:
            return request.last_token
        return request.first_token if len(self.tokens) + ahead == len(request.prompt) == 1 else None


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One new token of one sequence; ``sequence.finished`` says whether it was the last."""

    sequence: Sequence
    token: int
    logprobs: TokenLogprobs | None = None
    """Where its request wants them."""
