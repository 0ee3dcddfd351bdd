"""Answers as OpenAI's API lays them out: whole ones, and chunks of a stream."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.runtime.serving.answers.choices import Piece, ScoredToken
    from moec.runtime.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0


class Answer(Protocol):
    """The layout of an endpoint's answers.

    Attributes:
        envelope: all of a whole answer but ``choices`` and ``usage``.
        chunk_envelope: of a chunk.
        openings: parts of chunks that come before the first piece.
    """

    envelope: dict[str, Any]
    chunk_envelope: dict[str, Any]
    openings: list[dict[str, Any]]

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The choice that these pieces make together."""
        ...

    def delta(self, piece: Piece) -> dict[str, Any]:
        """A choice's part of a chunk."""
        ...


class ChatAnswer:
    """Of ``/v1/chat/completions``."""

    def __init__(self, model: str, tokenizer: Tokenizer, choices: int, *, scored: bool) -> None:
        common = _envelope("chatcmpl", model)
        self.envelope = common | {"object": "chat.completion"}
        self.chunk_envelope = common | {"object": "chat.completion.chunk"}
        self.openings: list[dict[str, Any]] = [
            {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            for index in range(choices)
        ]
        self._tokenizer = tokenizer
        self._scored = scored

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """See `Answer`."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        return self._choice(pieces) | {"message": message}

    def delta(self, piece: Piece) -> dict[str, Any]:
        """See `Answer`."""
        return self._choice([piece]) | {"delta": {"content": piece.text} if piece.text else {}}

    def _choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        scored = [token for piece in pieces for token in piece.scored]
        last = pieces[-1]
        return {
            "index": last.index,
            "logprobs": {"content": [self._entry(token) for token in scored], "refusal": None}
            if self._scored
            else None,
            "finish_reason": last.finish,
        }

    def _entry(self, scored: ScoredToken) -> dict[str, Any]:
        assert scored.logprobs is not None, "chats echo no prompt"
        top = [self._token(token, value) for token, value in scored.logprobs.top]
        return self._token(scored.token, scored.logprobs.chosen) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = token_text(self._tokenizer, token)
        return {"token": text, "logprob": finite(logprob), "bytes": text_bytes(text)}


class CompletionAnswer:
    """Of ``/v1/completions``."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, scored: bool) -> None:
        self.envelope = self.chunk_envelope = _envelope("cmpl", model) | {"object": "text_completion"}
        self.openings: list[dict[str, Any]] = []
        self._tokenizer = tokenizer
        self._scored = scored
        self._offsets: dict[int, int] = {}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """See `Answer`."""
        return self._choice(pieces)

    def delta(self, piece: Piece) -> dict[str, Any]:
        """See `Answer`."""
        return self._choice([piece])

    def _choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        last = pieces[-1]
        return {
            "index": last.index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs(last.index, pieces) if self._scored else None,
            "finish_reason": last.finish,
        }

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        scored = [token for piece in pieces for token in piece.scored]
        texts = [token_text(self._tokenizer, token.token) for token in scored]
        offset = self._offsets.get(index, 0)
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return {
            "tokens": texts,
            "token_logprobs": [each.logprobs and finite(each.logprobs.chosen) for each in scored],
            "top_logprobs": [each.logprobs and self._named(each.logprobs.top) for each in scored],
            "text_offset": offsets,
        }

    def _named(self, top: tuple[tuple[int, float], ...]) -> dict[str, float]:
        """By text; of tokens that read alike, such as parts of characters, the likeliest."""
        named: dict[str, float] = {}
        for token, value in top:
            named.setdefault(token_text(self._tokenizer, token), finite(value))
        return named


def _envelope(prefix: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, its leading space included; replacement characters where it is part of a character."""
    # Some tokenizers drop the space at the beginning of a text.
    alone, twice = (tokenizer.decode([token] * times, skip_special_tokens=False) for times in (1, 2))
    return twice[len(alone) :]


def finite(logprob: float) -> float:
    """What JSON can say, as OpenAI does of a token that cannot be."""
    return max(LEAST_LOGPROB, logprob)


def text_bytes(text: str) -> list[int] | None:
    """UTF-8 of a token's text; ``None`` where that is not the token's bytes."""
    return None if "\ufffd" in text else list(text.encode())


def usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The ``usage`` of an answer; ``cached_tokens`` of the prompts' tokens were not run."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
