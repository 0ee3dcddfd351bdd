"""GLM-5.3: hyper-connections by sums, and an indexer of pools whose selections are known where they are whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.compiler.tracing.masks import MaskSpec
from moec.compiler.tracing.patches.record import MODELS, Patch
from moec.compiler.tracing.selection import Selection, selection_of
from moec.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

_MODULE = f"{MODELS}.glm5_next.modeling_glm5_next"


def _layer(
    self: Any,
    hidden_states: torch.Tensor,
    prev_topk_indices: Any = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, Any]:
    """The layer; its streams are mixed by sums over the few of them, since a step's tokens have a matrix each."""
    selected = None
    post, comb, hidden = self.attn_hc(hidden_states)
    hidden = self.input_layernorm(hidden)
    if self.block_type == "linear_attention":
        hidden = self.self_attn(hidden_states=hidden, cache_params=past_key_values)
    else:
        hidden, _, selected = self.self_attn(
            hidden_states=hidden,
            attention_mask=None,
            past_key_values=past_key_values,
            prev_topk_indices=prev_topk_indices,
        )
    streams = _connected(post, comb, hidden, hidden_states)
    post, comb, hidden = self.ffn_hc(streams)
    hidden = self.mlp(self.post_attention_layernorm(hidden))
    return _connected(post, comb, hidden, streams), selected


def _connected(
    post: torch.Tensor, comb: torch.Tensor, hidden: torch.Tensor, streams: torch.Tensor
) -> torch.Tensor:
    """Streams after a block ``[1, T, N, H]``, from ``[1, T, N]``, ``[1, T, N, N]``, ``[1, T, H]`` and old ones."""
    out = post.unsqueeze(-1) * hidden.unsqueeze(-2)
    for source in range(streams.shape[2]):
        out = out + comb[:, :, source].unsqueeze(-1) * streams[:, :, source : source + 1]
    return out


def _select(self: Any, *_: Any, past_key_values: Any, **__: Any) -> Selection:
    """Word that all positions are selected: pools of them, and the last ones that make no pool."""
    owner = type(self).__name__
    if not self.index_kpool_always_select_tail:
        raise UnsupportedModelError(
            f"{owner} leaves out the last positions until they make a pool of {self.index_kpool}",
            "No kernel has such a mask.",
        )
    whole = Selection(int(self.index_topk))
    selection_of({"indices": whole}, past_key_values.max_context, owner)
    return whole


def _all_positions(*_: Any, **__: Any) -> MaskSpec:
    return MaskSpec()


def _no_padding(hidden_states: torch.Tensor, attention_mask: Any) -> torch.Tensor:
    del attention_mask
    return hidden_states


PATCHES = (
    Patch(_MODULE, "Glm5NextTextDecoderLayer.forward", _layer, "a product of two activations for each token"),
    Patch(_MODULE, "Glm5NextTextIndexer.forward", _select, "it builds scores and masks of a whole cache"),
    Patch(
        _MODULE,
        "Glm5NextTextAttention.build_attention_mask_from_topk",
        _all_positions,
        "it builds masks of a whole cache as tensors",
    ),
    Patch(_MODULE, "apply_mask_to_padding_states", _no_padding, "there is no padding in a step"),
)
