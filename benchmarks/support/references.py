"""What transformers computes for a checkpoint, kept in a file to hold a bundle against on another machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PROMPT_TOKENS = 40
NEW_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Reference:
    """S sequences of L tokens, vocabulary V."""

    sequences: NDArray[np.int64]
    """``[S, L]``: teacher-forced."""
    logits: NDArray[np.float32]
    """``[S, L, V]``: transformers eager in float32 on the weights as they are stored."""
    prompt: NDArray[np.int64]
    """``[P]``."""
    greedy: NDArray[np.int64]
    """``[N]``: what transformers in float32 continues ``prompt`` with."""
    perplexity: float
    """Of transformers in the dtype of the stored weights, on ``sequences``."""
    stored_errors: NDArray[np.float64]
    """``[S, L]``: `position_errors` of transformers in that dtype."""
    stored_agreement: float
    """Share of positions where transformers in that dtype has the same likeliest token as in float32. Both are not
    numbers where transformers has no such model."""
    sources: NDArray[np.int64] | None = None
    """``[S, M]``: what an encoder reads; then ``sequences`` are the decoder's, and ``prompt`` the first source."""

    def save(self, path: Path) -> None:
        """Write ``path``."""
        arrays: dict[str, Any] = {
            "sequences": self.sequences,
            "logits": self.logits,
            "prompt": self.prompt,
            "greedy": self.greedy,
            "perplexity": np.float64(self.perplexity),
            "stored_errors": self.stored_errors,
            "stored_agreement": np.float64(self.stored_agreement),
        }
        if self.sources is not None:
            arrays["sources"] = self.sources
        np.savez_compressed(path, **arrays)


def load_reference(path: Path) -> Reference:
    """Read what `Reference.save` wrote."""
    with np.load(path) as found:
        numbers = {name: float(found[name]) for name in ("perplexity", "stored_agreement")}
        return Reference(**{**found, **numbers})


def make_reference(checkpoint: Path, sequences: NDArray[np.int64], dtype: str) -> Reference:
    """Run transformers on ``checkpoint``: in float32, and once more in ``dtype``, which is a yardstick."""
    import torch

    ids = torch.from_numpy(sequences)
    with torch.inference_mode():
        judge = _network(checkpoint, "float32")
        logits = judge(ids).logits.float().numpy()
        prompt = ids[:1, :PROMPT_TOKENS]
        continued = judge.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        stored = _network(checkpoint, dtype)(ids).logits.float().numpy()
    return Reference(
        sequences,
        logits,
        prompt[0].numpy(),
        continued[0, PROMPT_TOKENS:].numpy(),
        perplexity(sequences, stored),
        position_errors(stored, logits),
        float((stored.argmax(-1) == logits.argmax(-1)).mean()),
    )


def computed_reference(
    sequences: NDArray[np.int64],
    logits: NDArray[np.float32],
    prompt: NDArray[np.int64],
    continued: NDArray[np.int64],
    sources: NDArray[np.int64] | None = None,
    stored: NDArray[np.float32] | None = None,
) -> Reference:
    """What another reference than transformers computed; ``stored`` in 16 bits, where it can, as a yardstick."""
    errors = np.full(sequences.shape, np.nan)
    score, agreement = perplexity(sequences, logits), np.nan
    if stored is not None:
        errors, score = position_errors(stored, logits), perplexity(sequences, stored)
        agreement = float((stored.argmax(-1) == logits.argmax(-1)).mean())
    return Reference(sequences, logits, prompt, continued, score, errors, agreement, sources)


def _network(checkpoint: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoConfig

    from moec.compiler.tracing.model.text_half import transformers_class

    kind: Any = transformers_class(AutoConfig.from_pretrained(checkpoint).model_type)
    model: Any = kind.from_pretrained(
        checkpoint,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def perplexity(sequences: NDArray[np.int64], logits: NDArray[np.float32]) -> float:
    """Of each token given those before it, over all ``[S, L]``."""
    values = logits[:, :-1].astype(np.float64)
    values -= values.max(-1, keepdims=True)
    chosen = np.take_along_axis(values, sequences[:, 1:, None], -1)[..., 0]
    return float(np.exp((np.log(np.exp(values).sum(-1)) - chosen).mean()))


def position_errors(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    """``|found - expected| / |expected|`` of each row of logits; infinite where one is not a number."""
    difference = np.linalg.norm(found.astype(np.float64) - expected, axis=-1)
    errors: NDArray[np.float64] = difference / np.linalg.norm(expected.astype(np.float64), axis=-1)
    return np.where(np.isfinite(errors), errors, np.inf)
