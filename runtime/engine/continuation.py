"""What ``generate`` is asked for, as requests of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.runtime.engine.sequence import Request
from moec.runtime.requests.checks import check_count

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moec.runtime.engine.engine import Engine
    from moec.runtime.requests.vocabulary import Vocabulary
    from moec.runtime.sampling import Sampling


@dataclass(frozen=True)
class Continuation:
    """How prompts are continued; see `moec.runtime.model.Model.generate`."""

    sampling: Sampling
    ends: tuple[int, ...]
    max_new_tokens: int | None
    """``None``: as many as context and cache hold."""
    min_new_tokens: int
    first: int | None
    """The first token, whatever the logits say."""
    last: int | None
    """The last one, where ``max_new_tokens`` is reached."""
    seed: int | None
    """Of row 0; row i has ``seed + i``."""

    def check(self, vocabulary: Vocabulary) -> None:
        """Refuse what no model does.

        Raises:
            RequestError: a number or a token is out of range.
        """
        check_count("min_new_tokens", self.min_new_tokens, least=0)
        if self.max_new_tokens is not None:
            check_count("max_new_tokens", self.max_new_tokens, least=1)
        if self.seed is not None:
            check_count("seed", self.seed, least=0)
        for name, forced in (("forced_bos_token_id", self.first), ("forced_eos_token_id", self.last)):
            if forced is not None:
                check_count(name, forced, least=0)
                vocabulary.check((forced,))

    def requests(
        self, engine: Engine, prompts: Iterable[tuple[int, ...]], sources: Iterable[tuple[int, ...]]
    ) -> list[Request]:
        """One for each prompt and what the encoder reads for it, nothing where there is none."""
        return [
            Request(
                prompt,
                room(engine, prompt, source) if self.max_new_tokens is None else int(self.max_new_tokens),
                int(self.min_new_tokens),
                frozenset(self.ends),
                self.sampling,
                None if self.seed is None else int(self.seed) + row,
                source,
                None if self.first is None else int(self.first),
                None if self.last is None else int(self.last),
            )
            for row, (prompt, source) in enumerate(zip(prompts, sources, strict=True))
        ]


def room(engine: Engine, prompt: tuple[int, ...], source: tuple[int, ...]) -> int:
    """New tokens that context and cache hold, at least one: a prompt too long is the engine's to refuse."""
    return max(1, engine.capacity_tokens(len(source)) - len(prompt))
