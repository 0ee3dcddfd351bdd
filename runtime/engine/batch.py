"""The tokens of one step as the kernels see them: flat arrays over all sequences of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from moec.runtime.tensors import aligned_zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from moec.runtime.engine.pages import PageTable
    from moec.runtime.engine.sequence import Sequence


class Piece(NamedTuple):
    """Consecutive tokens of one sequence in a step."""

    row: int
    """Of the page table."""
    start: int
    """Position of the first token."""
    tokens: list[int]
    source_row: int = 0
    """Page table row of what an encoder wrote for it."""
    source_tokens: int = 0
    """How many positions that has."""
    prompt: int = 0
    """Positions below this are of one call; each from it on is one by itself (see ``CapacityStep``)."""


class StepBatch:
    """Buffers for up to ``capacity`` tokens, filled anew for each step up to ``count``.

    Attributes:
        count: T.
        tokens: int64 token ids.
        positions: int64 positions within each token's sequence.
        each: what kernels are told of each token, int32. ``token_sequence`` is its page table row, ``token_position``
            its position. Where ``sources``, ``token_source`` is the row of its source, ``token_last`` the source's last
            position, ``token_call`` the number of the first token of its call.
        table: where each sequence's positions lie in the cache.
        page_table: its array, int32 ``[rows, pages]``.
        wanted: indices below T of the tokens whose logits are wanted, increasing.
    """

    def __init__(self, capacity: int, table: PageTable, *, sources: bool = False) -> None:
        self.capacity = capacity
        self.table = table
        self.page_table = table.array
        self.count = 0
        self.tokens: NDArray[np.int64] = aligned_zeros((capacity,), np.int64)
        self.positions: NDArray[np.int64] = aligned_zeros((capacity,), np.int64)
        self.each: dict[str, NDArray[np.int32]] = {
            name: aligned_zeros((capacity,), np.int32) for name in told_names(sources=sources)
        }
        self.wanted: list[int] = []

    def fill(self, pieces: Iterable[Piece], wanted: list[int]) -> None:
        """Set the tokens of a step.

        Args:
            pieces: of each sequence.
            wanted: see the class.
        """
        each, first = self.each, 0
        for piece in pieces:
            count = len(piece.tokens)
            own, positions = slice(first, first + count), np.arange(piece.start, piece.start + count)
            self.tokens[own] = piece.tokens
            self.positions[own] = positions
            each["token_sequence"][own] = piece.row
            each["token_position"][own] = positions
            if "token_source" in each:
                each["token_source"][own] = piece.source_row
                each["token_last"][own] = piece.source_tokens - 1
                alone = np.arange(first, first + count)
                each["token_call"][own] = np.where(positions < piece.prompt, first, alone)
            first += count
        self.count = first
        self.wanted = wanted


def told_names(*, sources: bool) -> tuple[str, ...]:
    """What kernels are told of each token, see `StepBatch.each`."""
    own = ("token_sequence", "token_position")
    return (*own, "token_source", "token_last", "token_call") if sources else own


class Executor(Protocol):
    """Runs a step through the model. The compiled chain is one; tests have a deterministic fake."""

    def run(self, batch: StepBatch) -> NDArray[np.float32]:
        """Append the step's tokens to the cache and return float32 logits ``[len(batch.wanted), V]``."""
        ...

    def encode(self, batch: StepBatch) -> None:
        """Run an encoder on whole sources, and write what decoders attend to into their pages."""
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
        sequence.sampler.choose(row, sequence.forbidden(), sequence.forced())
        for sequence, row in zip(sequences, logits, strict=True)
    ]
