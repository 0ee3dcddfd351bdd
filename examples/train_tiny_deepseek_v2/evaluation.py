"""What the held-out chapters say of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from examples.train_tiny_deepseek_v2.batches import held_out_batches
from examples.train_tiny_deepseek_v2.tokenizer import PAD_ID

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from examples.train_tiny_deepseek_v2.text import Chapter
    from examples.train_tiny_deepseek_v2.trainer import Trainer


@dataclass(frozen=True)
class Evaluation:
    """What the held-out chapters say of the model."""

    nats_per_token: float
    bits_per_byte: float
    expert_shares: list[list[float]]

    def entropies(self) -> list[float]:
        """Entropy (nats) of the expert use of every MoE layer."""
        return [-sum(p * math.log(p) for p in layer if p > 0) for layer in self.expert_shares]


@torch.no_grad()
def evaluate(trainer: Trainer, tokenizer: PreTrainedTokenizerFast, chapters: list[Chapter]) -> Evaluation:
    """The loss over the held-out chapters, in windows that do not overlap, and the use of experts."""
    model = trainer.model.eval()
    nats, tokens = 0.0, 0
    uses: list[torch.Tensor] = []
    for inputs, targets in held_out_batches(tokenizer, chapters):
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1).float()
        real = targets.flatten() != PAD_ID
        nats += functional.cross_entropy(logits[real], targets.flatten()[real], reduction="sum").item()
        tokens += int(real.sum())
        counts = [
            torch.bincount(c[real].reshape(-1), minlength=s.shape[-1]) for s, c in trainer.router.take()
        ]
        uses = counts if not uses else [a + b for a, b in zip(uses, counts, strict=True)]
    size = sum(len(chapter.text.encode()) for chapter in chapters)
    shares = [(use / use.sum()).tolist() for use in uses]
    return Evaluation(nats / tokens, nats / math.log(2) / size, shares)
