"""What a model has done so far: counters that the steps add to."""

from __future__ import annotations

from dataclasses import dataclass, field

STAGES = ("schedule", "segments", "attention", "experts", "sampling")
"""Stages of a step in the order in which they run; segments, attention and experts alternate."""


@dataclass
class Stats:
    """Counters since the model was loaded (or since `reset`).

    An expert *use* is one expert of one layer that at least one token of a step chose. A use is a hit where
    the expert was resident, a miss where its bytes had to come from the file.
    """

    steps: int = 0
    prompt_tokens: int = 0
    """Tokens run to fill the cache, recomputation after preemption included."""
    generated_tokens: int = 0
    preemptions: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_moved: int = 0
    """Expert bytes that came from the file tier: those read at load, and misses."""
    milliseconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """Wall time per stage."""

    @property
    def tokens(self) -> int:
        """All tokens that went through the model."""
        return self.prompt_tokens + self.generated_tokens

    @property
    def hit_rate(self) -> float:
        """Hits over uses; 0 where no expert was used yet."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else 0.0

    def reset(self) -> None:
        """Start counting from zero."""
        fresh = Stats()
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(fresh, name))

    def to_dict(self) -> dict[str, int | float | dict[str, float]]:
        """All counters as JSON values."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "preemptions": self.preemptions,
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hit_rate,
            "evictions": self.evictions,
            "bytes_moved": self.bytes_moved,
            "milliseconds": dict(self.milliseconds),
        }
