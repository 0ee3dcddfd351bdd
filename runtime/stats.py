"""What a model has done so far: counters that the steps add to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

STAGES = ("schedule", "segments", "attention", "states", "experts", "sampling")
"""Stages of a step in the order in which they run; segments, attention, states and experts alternate."""


@dataclass
class PrefetchStats:
    """How good the guesses were of which experts come next; all 0 where nothing was guessed."""

    chosen: int = 0
    """Chosen experts, in layers and steps that had a guess."""
    right: int = 0
    """Those of them that were guessed; as many are guessed as are chosen."""
    tokens: int = 0
    """Tokens and layers that had a guess."""
    exact: int = 0
    """Those of them whose chosen experts were all guessed."""
    fetched_bytes: int = 0
    """Of guessed experts that were not there."""
    wasted_bytes: int = 0
    """Of these, those of experts that nobody chose."""

    @property
    def recall(self) -> float:
        """Share of chosen experts that were guessed; 0 where nothing was."""
        return self.right / self.chosen if self.chosen else 0.0

    @property
    def exact_match(self) -> float:
        """Share of tokens and layers whose chosen experts were all guessed; 0 where nothing was."""
        return self.exact / self.tokens if self.tokens else 0.0

    def to_dict(self) -> dict[str, int | float]:
        """All counters as JSON values."""
        return {
            "recall": self.recall,
            "exact_match": self.exact_match,
            "fetched_bytes": self.fetched_bytes,
            "wasted_bytes": self.wasted_bytes,
        }


@dataclass
class Stats:
    """Counters since the model was loaded (or since `reset`).

    An expert *use* is one expert of one layer that at least one token of a step chose. A use is a hit where
    the expert was resident, a miss where its bytes had to come from the file. Uses on a GPU that has all experts of its
    layers are not counted.
    """

    steps: int = 0
    prompt_tokens: int = 0
    """Tokens run to fill the cache, recomputation after preemption included."""
    reused_tokens: int = 0
    """Tokens that were not run, since pages of the cache held them already (``prefix_caching``)."""
    prefix_hits: int = 0
    """Sequences of which that was so as they joined."""
    generated_tokens: int = 0
    preemptions: int = 0
    hits: int = 0
    misses: int = 0
    cpu_misses: int = 0
    """Those of the misses that the CPU computed for a GPU."""
    evictions: int = 0
    bytes_moved: int = 0
    """Expert bytes that came from the file tier: those read at load, and misses."""
    engine_bytes: int = 0
    """Those of misses that a GPU's copy engine brought, fed by a thread of the CPU."""
    late_orders: int = 0
    """Layers of a step for which that thread came too late, so that the GPU read host memory itself."""
    milliseconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """Wall time per stage."""
    prefetch: PrefetchStats = field(default_factory=PrefetchStats)

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

    def to_dict(self) -> dict[str, int | float | Mapping[str, int | float]]:
        """All counters as JSON values."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "prefix_hits": self.prefix_hits,
            "generated_tokens": self.generated_tokens,
            "preemptions": self.preemptions,
            "hits": self.hits,
            "misses": self.misses,
            "cpu_misses": self.cpu_misses,
            "hit_rate": self.hit_rate,
            "evictions": self.evictions,
            "bytes_moved": self.bytes_moved,
            "engine_bytes": self.engine_bytes,
            "late_orders": self.late_orders,
            "milliseconds": dict(self.milliseconds),
            "prefetch": self.prefetch.to_dict(),
        }
