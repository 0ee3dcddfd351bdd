"""What GGUF's tensors need to become parameters, beside what the checkpoints of their models need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

if TYPE_CHECKING:
    from collections.abc import Mapping

from moec.compiler.checkpoint.gguf.checkpoint import is_of_gguf


class AlternateOutputs(ConversionOps):  # type: ignore[misc]
    """Matrices ``[E, I, H]`` of equal experts become one ``[E, H, n * I]`` whose columns come from each in turn.

    With one matrix nothing is left but the transposition. Biases ``[E, I]`` are ``[E, n * I]``. It is done by reading
    (see ``packing.tensors.binding``).
    """

    def convert(self, *_: Any, **__: Any) -> Any:
        """Never called: binding takes this operation away."""
        raise NotImplementedError


class JoinLatentHeads(ConversionOps):  # type: ignore[misc]
    """``k_b`` ``[heads, latent, nope]`` and ``v_b`` ``[heads, v, latent]`` become ``[heads * (nope + v), latent]``."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, torch.Tensor]:
        """The one target, of keys and values."""
        keys, values = (_one(input_dict[pattern]) for pattern in source_patterns)
        return {target_patterns[0]: torch.cat((keys.mT, values), dim=1).flatten(0, 1)}


def _one(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _deepseek() -> tuple[WeightConverter, ...]:
    return (
        WeightConverter(
            [r"self_attn\.k_b_proj\.weight", r"self_attn\.v_b_proj\.weight"],
            "self_attn.kv_b_proj.weight",
            operations=[JoinLatentHeads()],
        ),
    )


def _gpt_oss() -> tuple[WeightConverter, ...]:
    return (
        WeightConverter(
            [r"experts\.gate_proj$", r"experts\.up_proj$"],
            "experts.gate_up_proj",
            operations=[AlternateOutputs()],
        ),
        WeightConverter(
            [r"experts\.gate_proj_bias$", r"experts\.up_proj_bias$"],
            "experts.gate_up_proj_bias",
            operations=[AlternateOutputs()],
        ),
        WeightConverter(r"experts\.down_proj$", "experts.down_proj", operations=[AlternateOutputs()]),
    )


CONVERSIONS = {"deepseek_v2": _deepseek, "deepseek_v3": _deepseek, "gpt_oss": _gpt_oss}
"""By ``model_type``."""


def gguf_conversions(config: Mapping[str, Any]) -> tuple[WeightConverter, ...]:
    """The conversions for a checkpoint with this config; none where it is not GGUF."""
    if not is_of_gguf(config):
        return ()
    make = CONVERSIONS.get(str(config.get("model_type")))
    return () if make is None else make()
