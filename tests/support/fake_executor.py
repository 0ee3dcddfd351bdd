"""A deterministic stand-in for the compiled chain: it reads its own paged memory, as attention kernels do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.layout.cache import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from moec.runtime.engine.batch import StepBatch
    from moec.runtime.engine.sequence import Sequence


class FakeExecutor:
    """Logits are a hash of all tokens that the page table leads to: a wrong page changes the result.

    With ``ahead`` it keeps the last tokens and two results, as a GPU does.
    """

    def __init__(self, pages: int, vocab_size: int, *, ahead: bool = False) -> None:
        self.vocab_size = vocab_size
        self.ahead = ahead
        self.begun_ahead = 0
        self._sequences: list[Sequence] = []
        self._chosen: list[int] = []
        self._places: list[list[int]] = [[], []]
        self.memory = np.full((pages, PAGE_TOKENS), -1, np.int64)
        self.step_tokens: list[int] = []
        self.encoded: list[int] = []
        """Tokens of each run of the encoder."""

    def run(self, batch: StepBatch) -> NDArray[np.float32]:
        self._sequences = []
        self.step_tokens.append(batch.count)
        self._check_order(batch)
        self._write(batch)
        logits = np.empty((len(batch.wanted), self.vocab_size), np.float32)
        for number, place in enumerate(batch.wanted):
            logits[number] = self.logits(self._history(batch, place))
        return logits

    def next_tokens(
        self, batch: StepBatch, sequences: list[Sequence], *, ahead: bool = False
    ) -> Callable[[], list[int]]:
        if ahead:
            assert self.can_run_ahead(sequences)
            assert batch.count == len(self._chosen)
            batch.tokens[: batch.count] = self._chosen
            self.begun_ahead += 1
        logits = self.run(batch)
        chosen = [
            sequence.sampler.choose(row, sequence.forbidden(int(ahead)), sequence.forced(int(ahead)))
            for sequence, row in zip(sequences, logits, strict=True)
        ]
        self._sequences, self._chosen = sequences, chosen
        self._places = [self._places[1], chosen]

        def read() -> list[int]:
            assert any(place is chosen for place in self._places), "the result is asked for too late"
            return chosen

        return read

    def encode(self, batch: StepBatch) -> None:
        self._sequences = []
        self.encoded.append(batch.count)
        self._check_order(batch)
        self._write(batch)
        row, last = (batch.each[name][: batch.count] for name in ("token_sequence", "token_last"))
        for number in set(row.tolist()):
            positions = batch.positions[: batch.count][row == number]
            assert positions.tolist() == list(range(last[row == number][0] + 1)), (
                "part of a source is missing"
            )

    def can_run_ahead(self, sequences: list[Sequence]) -> bool:
        return self.ahead and bool(sequences) and sequences == self._sequences

    def logits(self, history: tuple[int, ...]) -> NDArray[np.float32]:
        seed = 17
        for token in history:
            seed = (seed * 1_000_003 + token + 1) % (1 << 61)
        return np.random.default_rng(seed).standard_normal(self.vocab_size, np.float32)

    def _history(self, batch: StepBatch, place: int) -> tuple[int, ...]:
        own = self._read(batch, batch.each["token_sequence"][place], int(batch.positions[place]))
        if "token_source" not in batch.each:
            return own
        return self._read(batch, *(batch.each[name][place] for name in ("token_source", "token_last"))) + own

    def _write(self, batch: StepBatch) -> None:
        rows, positions = batch.each["token_sequence"][: batch.count], batch.positions[: batch.count]
        assert (batch.each["token_position"][: batch.count] == positions).all()
        pages = batch.page_table[rows, positions // PAGE_TOKENS]
        self.memory[pages, positions % PAGE_TOKENS] = batch.tokens[: batch.count]

    def _read(self, batch: StepBatch, row: int, last: int) -> tuple[int, ...]:
        where = np.arange(last + 1)
        tokens = self.memory[batch.page_table[row, where // PAGE_TOKENS], where % PAGE_TOKENS]
        assert (tokens >= 0).all(), "a position was read before it was written"
        return tuple(tokens.tolist())

    def _check_order(self, batch: StepBatch) -> None:
        rows, positions = batch.each["token_sequence"][: batch.count], batch.positions[: batch.count]
        same = rows[1:] == rows[:-1]
        assert (positions[1:][same] == positions[:-1][same] + 1).all(), (
            "tokens of a sequence are not adjacent"
        )
        assert len(set(rows.tolist())) == 1 + int((~same).sum()), "a sequence is split"
