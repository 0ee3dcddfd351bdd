"""The session that is tracing, as it is known to transformers' registries and to what stands in for its code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

if TYPE_CHECKING:
    import torch

INTERFACE = "moec"
"""Its name, while it lasts."""


def run_experts(module: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The experts interface: ``[T, H]``, ``[T, K]``, ``[T, K]`` to ``[T, H]``."""
    output: torch.Tensor = ALL_EXPERTS_FUNCTIONS[INTERFACE](module, hidden, index, weight)
    return output


def run_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **arguments: Any
) -> torch.Tensor:
    """The attention interface: ``[1, heads, T, D]`` in, ``[1, T, heads, D]`` out."""
    output: torch.Tensor = AttentionInterface()[INTERFACE](module, query, key, value, mask, **arguments)[0]
    return output
