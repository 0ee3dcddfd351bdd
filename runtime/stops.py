"""Stop strings in text that comes piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.runtime.tokenizer import TextStream


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    Attributes:
        found: whether one was there; text after it is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What is certain to be before any stop string, now that ``text`` has come."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for place in map(text.find, self._stops) if place >= 0]
        if places:
            self.found = True
            self._held = ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back: the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


class StopWatch:
    """Says of the tokens of one sequence, as they come, which completes a stop string."""

    def __init__(self, stream: TextStream, stops: Sequence[str]) -> None:
        self._stream = stream
        self._stops = StopStrings(stops)

    def push(self, token: int) -> bool:
        """Whether the text has a stop string now."""
        self._stops.push(self._stream.push(token))
        return self._stops.found


def text_before(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first stop string; all of it where there is none."""
    strings = StopStrings(stops)
    return strings.push(text) + strings.finish()


def _overlap(text: str, stop: str) -> int:
    """The longest beginning of ``stop``, not all of it, that ``text`` ends with."""
    most = min(len(text), len(stop) - 1)
    return next((length for length in range(most, 0, -1) if text.endswith(stop[:length])), 0)
