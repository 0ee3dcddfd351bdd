"""What is right for an encoder-decoder checkpoint: transformers, but for NLLB-MoE a reference of our own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForSeq2SeqLM

from tests.support.nllb_reference import NllbReference

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np


class Judge:
    """What is right for a checkpoint; in 16 bits a yardstick for others that compute in 16 bits."""

    def __init__(self, name: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model: Any = AutoModelForSeq2SeqLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.vocab_size = int(self.model.config.vocab_size)
        self.start = int(self.model.config.decoder_start_token_id)
        self._independent = NllbReference(self.model.state_dict(), self.model.config)
        self._by_hand = name == "nllb_moe"

    def logits(self, source: list[int], tokens: list[int]) -> np.ndarray[Any, Any]:
        """``[1, T, V]``."""
        with torch.inference_mode():
            if self._by_hand:
                return self._independent.logits(source, tokens)[None].float().numpy()
            given = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([tokens])}
            found: np.ndarray[Any, Any] = self.model(**given).logits.float().numpy()
            return found

    def greedy(self, source: list[int], count: int, forced: int | None = None) -> list[int]:
        """The decoder's tokens, its start among them."""
        if self._by_hand:
            return self._independent.greedy(source, count, forced)
        self.model.generation_config.eos_token_id = None
        with torch.inference_mode():
            found: list[list[int]] = self.model.generate(
                torch.tensor([source]), max_new_tokens=count, do_sample=False, forced_bos_token_id=forced
            ).tolist()
        return found[0]
