"""Batches of windows: of the training chapters, and of those held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from examples.train_tiny_deepseek_v2.tokenizer import BEGIN_ID, PAD_ID, encode_chapter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

    from examples.train_tiny_deepseek_v2.text import Chapter

WINDOW = 512


class Stream:
    """The training chapters end to end, given out as shuffled windows."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chapters: list[Chapter], seed: int) -> None:
        tokens: list[int] = []
        starts: list[int] = []
        for chapter in chapters:
            found, lines = encode_chapter(tokenizer, chapter)
            starts.extend(len(tokens) + at for at in lines)
            tokens.extend(found)
        self.tokens = torch.tensor(tokens)
        self.starts = torch.tensor(starts)
        self.seed = seed
        self.per_epoch = (len(tokens) - 2 * WINDOW) // WINDOW
        self.epoch = -1
        self.windows: list[torch.Tensor] = []

    def _load_epoch(self, epoch: int) -> None:
        """Cuts the stream at a new phase; half of the windows are moved on to begin at a line."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        phase = int(torch.randint(WINDOW, (1,), generator=rng))
        order = torch.randperm(self.per_epoch, generator=rng).tolist()
        at_line = (torch.rand(self.per_epoch, generator=rng) < 0.5).tolist()
        self.windows = [self._window(phase + k * WINDOW, at_line[k]) for k in order]
        self.epoch = epoch

    def _window(self, start: int, at_line: bool) -> torch.Tensor:
        if not at_line:
            return self.tokens[start : start + WINDOW + 1]
        index = min(int(torch.searchsorted(self.starts, start)), len(self.starts) - 1)
        line = min(int(self.starts[index]), len(self.tokens) - WINDOW)
        return torch.cat((torch.tensor([BEGIN_ID]), self.tokens[line : line + WINDOW]))

    def batch(self, step: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs and targets of a step: one in four steps of long rows, the others of half rows."""
        picked: list[torch.Tensor] = []
        for number in range(step * rows, (step + 1) * rows):
            epoch, at = divmod(number, self.per_epoch)
            if epoch != self.epoch:
                self._load_epoch(epoch)
            picked.append(self.windows[at])
        window = torch.stack(picked)
        length = WINDOW if step % 4 == 3 else WINDOW // 2
        return window[:, :-1].reshape(-1, length), window[:, 1:].reshape(-1, length)


def held_out_batches(
    tokenizer: PreTrainedTokenizerFast, chapters: list[Chapter]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, padded at the right to the window."""
    rows: list[list[int]] = []
    for chapter in chapters:
        tokens, _ = encode_chapter(tokenizer, chapter)
        rows.extend(tokens[at : at + WINDOW + 1] for at in range(0, len(tokens) - 1, WINDOW))
    for at in range(0, len(rows), 16):
        part = [row + [PAD_ID] * (WINDOW + 1 - len(row)) for row in rows[at : at + 16]]
        batch = torch.tensor(part)
        yield batch[:, :-1], batch[:, 1:]
