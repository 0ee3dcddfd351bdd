"""Streamers get tokens while they are generated, by the same protocol as transformers' streamers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from moec.errors import RequestError
from moec.runtime.stops import StopStrings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moec.runtime.tokenizer import Tokenizer


class Streamer(Protocol):
    """What ``generate(streamer=...)`` calls: `put` with the prompt ``[1, T]``, then each token ``[1]``."""

    def put(self, value: NDArray[Any]) -> None:
        """Take more token ids."""

    def end(self) -> None:
        """There will be no more tokens."""


def check_streamer(streamer: object, prompts: int) -> None:
    """Raise `RequestError` where ``streamer`` is none, or cannot say which of several prompts a token is of."""
    if not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise RequestError(
            f"{streamer!r} is no streamer.",
            "It has no methods put and end.",
            "Give a moec.runtime.TextStreamer.",
        )
    if prompts != 1:
        raise RequestError("A streamer takes one prompt.", f"There are {prompts}.", "Leave it out.")


class TextStreamer:
    """Prints text as it is generated, each piece as soon as its characters are certain.

    Args:
        tokenizer: of the bundle.
        skip_prompt: leave the prompt out.
        file: where to print; standard output by default.
        stop_strings: texts before which printing ends.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_prompt: bool = True,
        file: TextIO | None = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        self._skip_prompt, self._file = skip_prompt, file
        self._skip = skip_prompt
        self._begin()

    def put(self, value: NDArray[Any]) -> None:
        """Print what the new token ids make certain."""
        skip, self._skip = self._skip, False
        if not skip:
            text = "".join(self._decoder.push(token) for token in value.ravel().tolist())
            self._print(self._stops.push(text))

    def end(self) -> None:
        """Print what was held back, and a line end; what comes next is another prompt."""
        self._print(self._stops.push(self._decoder.finish()) + self._stops.finish() + "\n")
        self._begin()

    def _begin(self) -> None:
        self._decoder = self._tokenizer.stream()
        self._stops = StopStrings(self._stop_strings)
        self._skip = self._skip_prompt

    def _print(self, text: str) -> None:
        file = self._file if self._file is not None else sys.stdout
        file.write(text)
        file.flush()
