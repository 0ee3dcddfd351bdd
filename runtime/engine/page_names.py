"""Names for what pages of the key-value cache hold."""

from __future__ import annotations

from array import array
from hashlib import sha256

from moec.artifacts.layout.cache import PAGE_TOKENS


class PageNames:
    """Names of the full pages of a sequence, made as far as they are asked for.

    What a page holds follows from all tokens up to its end, so its name is SHA-256 of the name of the page before it
    and of its own tokens. Nobody finds two beginnings with equal names, and so nothing else is compared.

    Args:
        tokens: of the sequence; more may be appended.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._names: list[bytes] = []

    def first(self, count: int) -> list[bytes]:
        """The names of the first ``count`` pages."""
        for number in range(len(self._names), count):
            before = self._names[-1] if self._names else b""
            own = array("q", self._tokens[number * PAGE_TOKENS : (number + 1) * PAGE_TOKENS])
            self._names.append(sha256(before + own.tobytes()).digest())
        return self._names[:count]
