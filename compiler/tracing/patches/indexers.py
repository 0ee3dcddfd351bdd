"""Lightning indexers (DeepSeek-V3.2 and its kin): a marker instead of scores of a cache that is elsewhere."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moec.artifacts.layout.cache import selection_words
from moec.compiler.tracing import markers
from moec.compiler.tracing.patches.record import MODELS, Patch
from moec.compiler.tracing.selection import Selection

if TYPE_CHECKING:
    from collections.abc import Callable

WHY = "it builds scores and masks of a whole cache as tensors"


@dataclass(frozen=True)
class Indexer:
    """How a type's indexer makes queries and keys of what it is given; all else is the same in each."""

    folder: str
    """Of the modelling module."""
    name: str
    rotation: str
    """The module's function that rotates queries and keys."""
    rotated_first: bool
    """The entries that are rotated are the first ones."""


INDEXERS = (
    Indexer("axk2", "AXK2Indexer", "apply_rotary_pos_emb", rotated_first=True),
    Indexer("deepseek_v32", "DeepseekV32Indexer", "apply_rotary_pos_emb", rotated_first=True),
    Indexer("dots3_note", "Dots3NoteTextIndexer", "apply_rotary_pos_emb_interleave", rotated_first=True),
    Indexer("glm_moe_dsa", "GlmMoeDsaIndexer", "apply_rotary_pos_emb_interleave", rotated_first=True),
    Indexer("hy_v4", "HYV4Indexer", "apply_rotary_pos_emb", rotated_first=False),
)


def _selecting(indexer: Indexer) -> Callable[..., Selection | torch.Tensor]:
    """What stands in for an indexer's forward."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        q_resid: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        *_: Any,
        past_key_values: Any,
        **__: Any,
    ) -> Selection | torch.Tensor:
        """The best positions of each token, or word that they are all of them."""
        top_k, context = int(self.index_topk), int(past_key_values.max_context)
        if context <= top_k:
            return Selection(top_k)
        rotate = getattr(sys.modules[type(self).__module__], indexer.rotation)
        query = self.wq_b(q_resid).unflatten(-1, (self.n_heads, self.head_dim))
        key = self.k_norm(self.wk(hidden_states)).unsqueeze(2)
        sizes = [self.qk_rope_head_dim, self.head_dim - self.qk_rope_head_dim]
        own = 0 if indexer.rotated_first else 1
        parts = [list(torch.split(each, sizes if own == 0 else sizes[::-1], -1)) for each in (query, key)]
        parts[0][own], parts[1][own] = rotate(
            parts[0][own], parts[1][own], *position_embeddings, unsqueeze_dim=2
        )
        selected: torch.Tensor = markers.selection(
            torch.cat(parts[0], -1),
            self.weights_proj(hidden_states) * self.n_heads**-0.5,
            torch.cat(parts[1], -1).squeeze(2),
            float(self.softmax_scale),
            top_k,
            selection_words(context),
        )
        return selected

    return forward


def _of_positions(self: Any, *_: Any, **__: Any) -> Selection:
    return Selection(int(self.index_topk))


def _of_blocks(self: Any, *_: Any, **__: Any) -> Selection:
    return Selection(int(self.topk_blocks) * int(self.block_size))


PATCHES = (
    *(
        Patch(
            f"{MODELS}.{indexer.folder}.modeling_{indexer.folder}",
            f"{indexer.name}.forward",
            _selecting(indexer),
            WHY,
        )
        for indexer in INDEXERS
    ),
    Patch(
        f"{MODELS}.mistral_large4.modeling_mistral_large4",
        "MistralLarge4TextIndexer.forward",
        _of_positions,
        WHY,
    ),
    Patch(
        f"{MODELS}.minimax_m3_vl.modeling_minimax_m3_vl",
        "MiniMaxM3VLIndexer.forward",
        _of_blocks,
        f"{WHY}, and selects blocks of it",
    ),
)
"""Of the last two only selections that are whole are known."""
