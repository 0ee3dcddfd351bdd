"""Tiny random models of every supported type, in the checkpoint layout of the real ones.

Shapes are odd on purpose: expert counts that are no power of two, a vocabulary that is no multiple of
anything, eight query heads to one key head, top-1 routing, windows shorter than the prompts of the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from moec.compiler.tracing.model.text_half import transformers_class
from tests.support.tiny_models.decoders import DECODERS
from tests.support.tiny_models.encoder_decoders import ENCODER_DECODERS, sharpen
from tests.support.tiny_models.foreign import FOREIGN, REMADE, drop_identity_experts
from tests.support.tiny_models.latents import DEEPER, LATENT_MODELS
from tests.support.tiny_models.own import OWN, save_own
from tests.support.tiny_models.recurrent import RECURRENT
from tests.support.tiny_models.selecting_halves import SELECTING_HALVES
from tests.support.tiny_models.shared_experts import SHARED_EXPERTS
from tests.support.tiny_models.sparse_attention import SELECTING, SPARSE_ATTENTION
from tests.support.tiny_models.text_halves import TEXT_HALVES
from tests.support.tiny_models.windows import WINDOWS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TINY: dict[str, Callable[[], PretrainedConfig]] = {
    **LATENT_MODELS,
    **DECODERS,
    **FOREIGN,
    **RECURRENT,
    **SHARED_EXPERTS,
    **SPARSE_ATTENTION,
    **TEXT_HALVES,
    **SELECTING_HALVES,
    **WINDOWS,
}
"""Name of a tiny model -> its config. The name is the model type, except ``deepseek_v2_lite``; a file a family."""


def config_of(name: str) -> PretrainedConfig:
    """The config of a model of ``TINY``, or of one that has tests of its own."""
    return {**TINY, **ENCODER_DECODERS, **REMADE, **SELECTING, **DEEPER}[name]()


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of ``config_of(name)``, in evaluation mode; equal seeds give equal random weights.

    Nothing that a model has is left at a value that hides it: norms are not one, biases and sinks not zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = config_of(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers_class(config.model_type)
        make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
        model: PreTrainedModel = make(config, dtype=torch.float32)
        tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
        persistent = set(model.state_dict())
        with torch.no_grad():
            for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if path in persistent and tensor.is_floating_point():
                    _fill(path, tensor, tied=tied)
        if config.is_encoder_decoder:
            sharpen(model)
    model.tie_weights()
    model.eval()
    wide = tuple(model._get_dtype_plan(dtype))  # what transformers loads in float32 whatever is asked for
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if path in persistent and tensor.is_floating_point() and not any(part in path for part in wide):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    return model


def save(
    name: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "50GB"
) -> Path:
    """Write ``build(name, seed, dtype)`` to ``folder`` as the real checkpoints of its type are laid out.

    Args:
        name: key of ``TINY``, ``ENCODER_DECODERS``, ``REMADE`` or ``OWN`` (models that transformers does not have).
        folder: made if missing.
        seed: of the weights.
        dtype: of the weights.
        shard: largest size of one safetensors file, e.g. ``"200KB"``.
    """
    if name in OWN:
        return save_own(name, folder, seed, dtype, shard)
    build(name, seed, dtype).save_pretrained(folder, max_shard_size=shard)
    if name == "longcat_flash":
        drop_identity_experts(folder)
    return folder


DERIVED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
"""Ends of the names of buffers that checkpoints have, and that follow from the config."""


def _fill(path: str, tensor: torch.Tensor, *, tied: bool) -> None:
    if path.endswith(DERIVED):
        return
    if path.endswith("balancing_biases"):
        torch.nn.init.normal_(tensor, std=0.1)
        tensor[-1] = -1.0  # ZAYA1: transformers makes it so, whatever it loads
        return
    if (path.endswith("weight") and "norm" in path.split(".")[-2]) or path.endswith(("scale", "scalar")):
        torch.nn.init.normal_(tensor, mean=1.0, std=0.1)
    elif "embed_tokens" in path and not tied:  # a tied one that large would repeat its own token for ever
        torch.nn.init.normal_(tensor, std=0.5)
    elif tensor.dim() < 2 or "bias" in path:
        torch.nn.init.normal_(tensor, std=0.1)
    else:
        torch.nn.init.normal_(tensor, std=tensor.shape[-1] ** -0.5)
