"""What one architecture of our own is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """A causal language model that transformers does not have."""

    config: type[PreTrainedConfig]
    """Takes the keys of ``config.json`` but ``model_type``."""
    model: type[PreTrainedModel]
    conversions: tuple[Any, ...]
    """How tensors of its checkpoints become parameters: transformers' ``WeightRenaming`` and ``WeightConverter``."""
    source: str
    """The published description that the model file was written from."""
