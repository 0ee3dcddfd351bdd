"""LFM2: gated short convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.compiler.tracing import state_markers as markers
from moec.compiler.tracing.patches.record import MODELS, OUTSIDE, Patch

if TYPE_CHECKING:
    import torch


def _short_convolution(self: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The layer with tokens before channels throughout."""
    before, after, x = self.in_proj(hidden_states).chunk(3, -1)
    taps = self.conv.weight.squeeze(1).transpose(0, 1)
    mixed: torch.Tensor = self.out_proj(after * markers.convolution(before * x, taps, self.conv.bias))
    return mixed


PATCHES = (
    Patch(f"{MODELS}.lfm2_moe.modeling_lfm2_moe", "Lfm2MoeShortConv.forward", _short_convolution, OUTSIDE),
)
