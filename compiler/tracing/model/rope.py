"""Rotary tables that depend on how long the sequence is: decided once, by the context that is compiled for.

transformers picks the frequencies of ``longrope`` and ``dynamic`` anew in every call, by the largest position
in the batch, while keys that were cached before keep the old ones. A compiled model has one table, so
sequences of different lengths can share a batch and a cached key never changes. Choose ``max_context`` within
the original context to get the short-context table. Phi-3.5-MoE's config has the scale of each table, too.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moec.compiler.tracing.model.text_half import used_modules
from moec.errors import UnsupportedModelError

FIXED = "fixed"
"""Stands in a module's ``rope_type`` so that transformers leaves the frequencies alone."""


def fix_rotary_tables(model: torch.nn.Module, max_context: int) -> dict[str, torch.Tensor]:
    """Settle every length-dependent rotary module of ``model`` for ``max_context`` tokens.

    Returns:
        Frequencies by the path of their buffer, for those that were settled.
    """
    frequencies: dict[str, torch.Tensor] = {}
    for path, module in used_modules(model):
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict) and any(_depends_on_length(str(item)) for item in kind.values()):
            raise UnsupportedModelError(
                f"{type(module).__name__} has one length-dependent rotary table for each kind of layer.",
                "moec settles such tables at compile time, and knows models with one table only.",
            )
        if isinstance(kind, str) and _depends_on_length(kind):
            frequencies[f"{path}.inv_freq"] = _settle(module, kind, max_context)
    return frequencies


def _depends_on_length(kind: str) -> bool:
    return "dynamic" in kind or kind == "longrope"


def _settle(module: Any, kind: str, max_context: int) -> torch.Tensor:
    parameters = module.config.rope_parameters
    if kind == "longrope":
        short = max_context <= parameters["original_max_position_embeddings"]
    else:
        short = max_context <= module.original_max_seq_len
    length = None if short else max_context
    frequencies: torch.Tensor
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, torch.device("cpu"), seq_len=length)
    module.attention_scaling = parameters.get("short_mscale" if short else "long_mscale", scaling)
    module.rope_type = FIXED
    return frequencies
