"""Which token ids a model takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moec.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from moec.artifacts.model import ModelRecord


@dataclass(frozen=True)
class Vocabulary:
    """Ids ``0 .. size - 1``, but for those that stand for what the model is not given."""

    size: int
    placeholders: Mapping[str, int] = field(default_factory=dict)
    """See ``ModelRecord.placeholders``."""

    @classmethod
    def of(cls, model: ModelRecord) -> Vocabulary:
        """The vocabulary of a bundle's model."""
        return cls(model.vocab_size, model.placeholders)

    def known(self, tokens: Iterable[int]) -> frozenset[int]:
        """Those that it has: a checkpoint, or a client, may name end tokens that never come."""
        return frozenset(token for token in tokens if 0 <= token < self.size)

    def check(self, tokens: Sequence[int]) -> None:
        """Raise `RequestError` where a prompt is empty or has an id that the model does not take."""
        if not tokens:
            raise RequestError(
                "The prompt is empty.", "There is no token to continue.", "Give at least one token."
            )
        for kind, token in self.placeholders.items():
            if token in tokens:
                raise RequestError(
                    f"Token id {token} stands for {kind} data.",
                    "The bundle has the language model alone, which reads text.",
                    f"Leave {kind} inputs out of the prompt.",
                )
        for bound in (min(tokens), max(tokens)):
            if not 0 <= bound < self.size:
                raise RequestError(
                    f"Token id {bound} is out of range.",
                    f"The model's vocabulary has ids 0 to {self.size - 1}.",
                    "Encode the prompt with the tokenizer of this bundle.",
                )
