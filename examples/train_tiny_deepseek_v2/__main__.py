"""The command: ``python -m examples.train_tiny_deepseek_v2``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from examples.train_tiny_deepseek_v2.architecture import make_config
from examples.train_tiny_deepseek_v2.attention import causal_attention
from examples.train_tiny_deepseek_v2.batches import Stream
from examples.train_tiny_deepseek_v2.card import write_card
from examples.train_tiny_deepseek_v2.experts import grouped_experts
from examples.train_tiny_deepseek_v2.export import export
from examples.train_tiny_deepseek_v2.run import Run, keep_memory
from examples.train_tiny_deepseek_v2.settings import RATES, Settings
from examples.train_tiny_deepseek_v2.text import read_text, to_chapters
from examples.train_tiny_deepseek_v2.tokenizer import train_tokenizer
from examples.train_tiny_deepseek_v2.trainer import Trainer

WORK = Path(tempfile.gettempdir()) / "train"


@click.command()
@click.option("--steps", default=2620, show_default=True, help="Optimizer steps in all.")
@click.option("--threads", default=1, show_default=True, help="Threads that torch may use.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Output of the bible program.")
@click.option("--work", type=click.Path(path_type=Path), default=WORK, show_default=True, help="Saved state.")
@click.option("--every", default=100, show_default=True, help="Steps between saved states.")
@click.option("--batch-tokens", default=4096, show_default=True, help="Tokens of a step.")
@click.option("--learning-rate", default=2e-3, show_default=True)
@click.option("--weight-decay", default=0.1, show_default=True)
@click.option("--dropout", default=0.1, show_default=True)
@click.option("--balance", default=0.01, show_default=True, help="Weight of the load-balancing loss.")
@click.option("--rates", default=RATES, show_default=True, help="STEP:SHARE of the learning rate, ...")
@click.option("--vocab-size", default=2048, show_default=True)
@click.option("--seed", default=1611, show_default=True)
def main(
    steps: int,
    threads: int,
    output: Path,
    text: Path | None,
    work: Path,
    every: int,
    vocab_size: int,
    **rest: Any,
) -> None:
    """Train the tiny DeepSeek-V2 and write its checkpoint, tokenizer and model card."""
    keep_memory()
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    ALL_EXPERTS_FUNCTIONS.register("tiny_grouped", grouped_experts)
    ALL_ATTENTION_FUNCTIONS.register("tiny_causal", causal_attention)
    chapters = to_chapters(read_text(text))
    train = [chapter for chapter in chapters if not chapter.held_out]
    tokenizer = train_tokenizer(train, vocab_size)
    trainer = Trainer(make_config(vocab_size), Settings(steps=steps, **rest))
    stream = Stream(tokenizer, train, trainer.settings.seed)
    held_out = [chapter for chapter in chapters if chapter.held_out]
    run = Run(trainer, tokenizer, stream, held_out, work, every)
    click.echo(f"{len(train)} chapters, {len(stream.tokens)} tokens, {len(held_out)} chapters held out")
    if (work / "state.pt").exists():
        trainer.load(work / "state.pt")
        click.echo(f"resumed at step {trainer.step}")
    run.train()
    export(run, output)
    found = write_card(run, output, train)
    click.echo(f"held-out {found.nats_per_token:.4f} nats/token, {found.bits_per_byte:.4f} bits/byte")


if __name__ == "__main__":
    main()
