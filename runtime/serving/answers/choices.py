"""The answer's choices: tokens in, pieces of text with logprobs out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moec.runtime.stops import StopStrings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.runtime.logprobs import TokenLogprobs
    from moec.runtime.serving.driver import Token
    from moec.runtime.tokenizer import TextStream

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and how likely it was."""

    token: int
    logprobs: TokenLogprobs | None
    """Of the first token of a prompt there are none."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More text of a choice."""

    index: int
    text: str
    scored: tuple[ScoredToken, ...]
    """The tokens since the last piece, where logprobs are wanted; an end token is none of them."""
    finish: FinishReason | None


class Choice:
    """One continuation as it comes.

    Attributes:
        tokens: how many have come, an end token and those of a stop string included.
        reused: tokens of the prompt that were in the cache already; 0 before the first has come.
        finish: why it ended.
        stopped: whether it ended by a stop string, while the engine would go on.
    """

    def __init__(self, index: int, stream: TextStream, stops: Sequence[str], before: str = "") -> None:
        """``before`` is text that the first piece begins with, whatever comes."""
        self._index = index
        self._stream = stream
        self._stops = StopStrings(stops)
        self._before = before
        self._scored: list[ScoredToken] = []
        self.tokens = self.reused = 0
        self.finish: FinishReason | None = None
        self.stopped = False

    def begin(self, prompt: Sequence[ScoredToken]) -> None:
        """Let the first piece begin with the tokens of an echoed prompt."""
        self._scored = list(prompt)

    def push(self, event: Token) -> Piece | None:
        """The piece that is certain now; none in the middle of a character or of what may be a stop string."""
        self.tokens += 1
        self.reused = event.reused
        ended = event.finished == "stop"
        text = "" if ended else self._stops.push(self._stream.push(event.token))
        if event.logprobs is not None and not ended:
            self._scored.append(ScoredToken(event.token, event.logprobs))
        if event.finished is not None and not self._stops.found:
            text += self._stops.push(self._stream.finish()) + self._stops.finish()
            self.finish = "stop" if ended else "length"
        if self._stops.found:
            self.finish, self.stopped = "stop", event.finished is None
        text, self._before = self._before + text, ""
        if not text and self.finish is None:
            return None
        scored, self._scored = tuple(self._scored), []
        return Piece(self._index, text, scored, self.finish)
