"""One optimizer step, and all that a resumed run needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from examples.train_tiny_deepseek_v2.architecture import make_model
from examples.train_tiny_deepseek_v2.batches import WINDOW, Stream
from examples.train_tiny_deepseek_v2.hooks import Dropout, Router, balance_loss

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import DeepseekV2Config

    from examples.train_tiny_deepseek_v2.settings import Settings


class Trainer:
    """A bfloat16 model, its float32 weights and the optimizer of those."""

    def __init__(self, config: DeepseekV2Config, settings: Settings) -> None:
        self.settings = settings
        self.step = 0
        self.seconds = 0.0
        fresh = make_model(config, settings.seed)
        self.master = [p.detach().clone().requires_grad_() for p in fresh.parameters()]
        self.model = fresh.to(torch.bfloat16)
        self.model.set_attn_implementation("tiny_causal")
        self.model.set_experts_implementation("tiny_grouped")
        self.router = Router(self.model)
        if settings.dropout > 0:
            Dropout(settings.dropout).attach(self.model)
        groups = [
            {"params": [p for p in self.master if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.master if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    def train_step(self, stream: Stream) -> tuple[float, float]:
        """One batch: gives its loss and its balance loss."""
        torch.manual_seed(self.settings.seed * 7_919 + self.step)
        inputs, targets = stream.batch(self.step, self.settings.batch_tokens // WINDOW)
        self.model.train()
        logits = self.model(input_ids=inputs, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        balance = balance_loss(self.router.take())
        (loss + self.settings.balance * balance).backward()  # type: ignore[no-untyped-call]
        self._update()
        self.step += 1
        return loss.item(), balance.item()

    def _update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        for master, weight in zip(self.master, self.model.parameters(), strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.master, 1.0)
        self.optimizer.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the float32 weights into the model."""
        for master, weight in zip(self.master, self.model.parameters(), strict=True):
            weight.copy_(master)

    def save(self, path: Path) -> None:
        """Writes all that a resumed run needs, then puts it in place."""
        state = {
            "master": [p.detach() for p in self.master],
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "settings": asdict(self.settings),
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Goes on from a saved state of this run, or of one that differs in steps not yet begun."""
        state = torch.load(path, weights_only=True)
        self.settings.check_resumes(state["settings"], state["step"])
        with torch.no_grad():
            for master, saved in zip(self.master, state["master"], strict=True):
                master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.publish()
