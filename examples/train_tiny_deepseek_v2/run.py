"""A run: steps, a held-out loss now and then, and saved states."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from examples.train_tiny_deepseek_v2.evaluation import evaluate

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from examples.train_tiny_deepseek_v2.batches import Stream
    from examples.train_tiny_deepseek_v2.text import Chapter
    from examples.train_tiny_deepseek_v2.trainer import Trainer


def keep_memory() -> None:
    """Has the C library keep freed memory: fresh pages at every step took a third of the time."""
    library = ctypes.CDLL(None)
    no_maps, no_trim = library.mallopt(-4, 0), library.mallopt(-1, 2**31 - 1)
    if not (no_maps and no_trim):
        click.echo("the C library does not keep its memory; the run is right but slower", err=True)


@dataclass
class Run:
    """A training run: what it trains, on what, and where it keeps its state."""

    trainer: Trainer
    tokenizer: PreTrainedTokenizerFast
    stream: Stream
    held_out: list[Chapter]
    work: Path
    every: int

    def train(self) -> None:
        """Trains to the last step, with a held-out loss and a saved state now and then."""
        started = time.monotonic() - self.trainer.seconds
        loss, last = 0.0, self.trainer.settings.steps
        while self.trainer.step < last:
            now, balance = self.trainer.train_step(self.stream)
            loss = now if loss == 0.0 else 0.95 * loss + 0.05 * now
            self.trainer.seconds = time.monotonic() - started
            if self.trainer.step % 20 == 0:
                self._say(f"loss {loss:.4f} balance {balance:.4f}")
            if self.trainer.step % self.every == 0:
                self.trainer.save(self.work / "state.pt")
                self._report()

    def _say(self, words: str) -> None:
        step, seconds = self.trainer.step, self.trainer.seconds
        click.echo(f"step {step} {seconds:.0f}s lr {self.trainer.settings.rate(step):.2e} {words}")

    def _report(self) -> None:
        found = evaluate(self.trainer, self.tokenizer, self.held_out)
        entropies = " ".join(f"{value:.3f}" for value in found.entropies())
        lowest = min(min(layer) for layer in found.expert_shares)
        self._say(
            f"HELD-OUT {found.nats_per_token:.4f} nats/token {found.bits_per_byte:.4f} bits/byte "
            f"entropy {entropies} least share {lowest:.4f}"
        )
