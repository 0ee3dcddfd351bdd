"""The cache that a trace hands to transformers: everything is kept outside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache

if TYPE_CHECKING:
    import torch


class RecordingCache(Cache):  # type: ignore[misc]
    """A cache that keeps nothing: it remembers what a layer wanted cached, and gives it straight back.

    Args:
        max_context: tokens of the longest sequence.
    """

    def __init__(self, max_context: int) -> None:
        super().__init__(layers=[])
        self.max_context = max_context
        self.recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Remember ``layer_idx``'s keys and values, or latents."""
        self.recorded[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        """States are outside too: a layer finds none here."""

    get_recurrent_state = get_conv_state

    def update_conv_state(self, conv_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Inputs of a convolution, straight back: what was before them its marker sees."""
        return conv_states

    def update_recurrent_state(self, *_: Any, **__: Any) -> None:
        """What a layer hands over is nothing: its marker advances the state."""

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Nothing was seen before this step."""
        return 0

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        """Queries begin where this step begins."""
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        """Keys are this step's own."""
        return query_length, 0

    @property
    def is_sliding(self) -> list[bool]:
        """Windows are the mask's matter, not the cache's."""
        return [False]

    def __len__(self) -> int:
        return 0
