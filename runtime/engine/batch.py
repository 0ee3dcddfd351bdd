"""The tokens of one step as the kernels see them: flat arrays over all sequences of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from moec.runtime.tensors import aligned_zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from moec.runtime.cache.pages import PageTable
    from moec.runtime.engine.sequence import Sequence


class StepBatch:
    """Buffers for up to ``capacity`` tokens, filled anew for each step up to ``count``.

    Attributes:
        count: T.
        tokens: int64 token ids.
        positions: int64 positions within each token's sequence.
        token_sequence: int32 page table row of each token.
        token_position: ``positions`` as int32, for the cache kernels.
        table: where each sequence's positions lie in the cache.
        page_table: its array, int32 ``[rows, pages]``.
        wanted: indices below T of the tokens whose logits are wanted, increasing.
    """

    def __init__(self, capacity: int, table: PageTable) -> None:
        self.capacity = capacity
        self.table = table
        self.page_table = table.array
        self.count = 0
        self.tokens: NDArray[np.int64] = aligned_zeros((capacity,), np.int64)
        self.positions: NDArray[np.int64] = aligned_zeros((capacity,), np.int64)
        self.token_sequence: NDArray[np.int32] = aligned_zeros((capacity,), np.int32)
        self.token_position: NDArray[np.int32] = aligned_zeros((capacity,), np.int32)
        self.wanted: list[int] = []

    def fill(self, pieces: Iterable[tuple[int, int, list[int]]], wanted: list[int]) -> None:
        """Set the tokens of a step.

        Args:
            pieces: page table row, position of the first token, and consecutive tokens, of each sequence.
            wanted: see the class.
        """
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for row, start, piece in pieces:
            tokens += piece
            positions += range(start, start + len(piece))
            rows += [row] * len(piece)
        self.count = count = len(tokens)
        self.wanted = wanted
        self.tokens[:count] = tokens
        self.positions[:count] = positions
        self.token_position[:count] = positions
        self.token_sequence[:count] = rows


class Executor(Protocol):
    """Runs a step through the model. The compiled chain is one; tests have a deterministic fake."""

    def run(self, batch: StepBatch) -> NDArray[np.float32]:
        """Append the step's tokens to the cache and return float32 logits ``[len(batch.wanted), V]``."""
        ...

    def next_tokens(
        self, batch: StepBatch, sequences: list[Sequence], *, ahead: bool = False
    ) -> Callable[[], list[int]]:
        """Run a step and choose a token for each row of ``batch.wanted``, as the sequence of that row wants it.

        Where tokens are chosen is the executor's: a GPU does it without handing the logits out.

        Args:
            batch: the step.
            sequences: one for each row of ``batch.wanted``.
            ahead: begin before the tokens of the step in front were asked for: the step's tokens are those, which
                the device has, whatever ``batch.tokens`` says. Only where `can_run_ahead`.

        Returns:
            What waits for the tokens. It must be called before the step after the next one is begun.
        """
        ...

    def can_run_ahead(self, sequences: list[Sequence]) -> bool:
        """Whether a step can be begun whose tokens are those that the last step chooses for ``sequences``."""
        ...


def choose_on_host(logits: NDArray[np.float32], sequences: list[Sequence]) -> list[int]:
    """A token for each row of logits ``[R, V]``, by the samplers of ``sequences``."""
    return [
        sequence.sampler.choose(row, sequence.forbidden())
        for sequence, row in zip(sequences, logits, strict=True)
    ]
