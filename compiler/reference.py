"""What transformers computes for a checkpoint: the judge of a bundle's logits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.accuracy import Agreement
from moec.compiler.checkpoint.gguf.checkpoint import is_of_gguf
from moec.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from moec.artifacts.model import ModelRecord
    from moec.compiler.checkpoint import Checkpoint


def check_same_model(checkpoint: Checkpoint, model: ModelRecord) -> None:
    """Refuse a checkpoint whose logits are not those of the bundle's model, whatever their weights.

    Args:
        checkpoint: to compare with; how its weights are stored may be another than the bundle's.
        model: of the bundle.

    Raises:
        CheckpointError: it is of another type or size.
        UnsupportedModelError: it is no model that moec compiles.
    """
    from moec.compiler.tracing.model.build import build_config

    config = build_config(checkpoint.config)
    text = config.get_text_config()
    found = config.model_type, int(text.vocab_size), int(text.hidden_size)
    own = model.model_type, model.vocab_size, model.hidden_size
    if found != own:
        kinds = [
            f"{kind} with {tokens} tokens and {width} values each" for kind, tokens, width in (found, own)
        ]
        raise CheckpointError(
            f"{checkpoint.name} is of another model than the bundle.",
            f"It is a {kinds[0]}; the bundle has a {kinds[1]}.",
            "Name the checkpoint that the bundle was made of.",
        )


def reference_logits(
    model: Path, sequences: Sequence[Sequence[int]], dtype: str
) -> Iterator[np.ndarray[Any, Any]]:
    """Logits ``[T, V]`` float32 of each sequence, from transformers' eager implementation.

    Args:
        model: the checkpoint's folder.
        sequences: token ids.
        dtype: what transformers loads the weights in and computes in.

    Raises:
        UnsupportedModelError: transformers has no model of this type.
    """
    import torch

    from moec.compiler.architectures import ARCHITECTURES

    model_type = json.loads((model / "config.json").read_text())["model_type"]
    if model_type in ARCHITECTURES:
        raise UnsupportedModelError(
            f"transformers has no {model_type} model to compare with.",
            "The code that such checkpoints bring along is never run.",
            "Without --reference, verify reads every byte of the bundle and holds it against the manifest.",
        )
    yield from _logits(transformers_network(model, model_type, getattr(torch, dtype)), sequences)


def checkpoint_logits(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], dtype: str
) -> Iterator[np.ndarray[Any, Any]]:
    """The same for a checkpoint that was opened, which may be a GGUF model."""
    import torch

    if not is_of_gguf(checkpoint.config):
        yield from reference_logits(checkpoint.path, sequences, dtype)
    else:
        yield from _logits(gguf_network(checkpoint, getattr(torch, dtype)), sequences)


def _logits(network: Any, sequences: Sequence[Sequence[int]]) -> Iterator[np.ndarray[Any, Any]]:
    import torch

    with torch.inference_mode():
        for ids in sequences:
            yield network(torch.tensor([list(ids)])).logits[0].float().numpy()


def gguf_network(checkpoint: Checkpoint, dtype: Any) -> Any:
    """The same of a GGUF model, of which transformers gets a config and dequantized weights."""
    from moec.compiler.packing.parameters import fill_parameters
    from moec.compiler.tracing.model.build import build_config
    from moec.compiler.tracing.model.text_half import from_tokens, transformers_class

    config = build_config(checkpoint.config)
    network = transformers_class(config.model_type).from_config(
        config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    fill_parameters(network, checkpoint)
    return from_tokens(network).eval()


def transformers_network(model: Path, model_type: str, dtype: Any) -> Any:
    """The eager implementation of transformers of a checkpoint, from token ids to logits, for evaluation."""
    from moec.compiler.tracing.model.text_half import from_tokens, transformers_class

    loaded = transformers_class(model_type).from_pretrained(
        model, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    return from_tokens(loaded).eval()


def compare(
    sequences: Sequence[Sequence[int]],
    reference: Iterator[np.ndarray[Any, Any]],
    measured: Iterator[np.ndarray[Any, Any]],
) -> Agreement:
    """Compare logits ``[T, V]`` position by position."""
    same = targets = 0
    divergences: list[np.ndarray[Any, Any]] = []
    losses = np.zeros(2)
    for ids, expected, found in zip(sequences, reference, measured, strict=True):
        p, q = _log_softmax(expected), _log_softmax(found)
        divergences.append(np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        following = np.asarray(ids[1:])
        rows = np.arange(len(following))
        losses -= (p[rows, following].sum(), q[rows, following].sum())
        targets += len(following)
    kl = np.concatenate(divergences)
    perplexities = np.exp(losses / max(targets, 1))
    return Agreement(
        tokens=len(kl),
        argmax_agreement=same / len(kl),
        mean_kl=float(kl.mean()),
        kl_99=float(np.quantile(kl, 0.99)),
        max_kl=float(kl.max()),
        reference_perplexity=float(perplexities[0]),
        perplexity=float(perplexities[1]),
    )


def _log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray[Any, Any] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
