"""Lightning indexers (DeepSeek-V3.2 and its kin): what they select instead of scores of a cache that is elsewhere."""

from __future__ import annotations

from typing import Any

from moec.compiler.tracing.patches.record import MODELS, Patch
from moec.compiler.tracing.selection import Selection

INDEXERS = {
    "axk2": "AXK2Indexer",
    "deepseek_v32": "DeepseekV32Indexer",
    "dots3_note": "Dots3NoteTextIndexer",
    "glm_moe_dsa": "GlmMoeDsaIndexer",
    "hy_v4": "HYV4Indexer",
    "mistral_large4": "MistralLarge4TextIndexer",
}
"""Folder of the modelling module -> its indexer class."""


def _select(self: Any, *_: Any, **__: Any) -> Selection:
    return Selection(int(self.index_topk))


def _select_blocks(self: Any, *_: Any, **__: Any) -> Selection:
    return Selection(int(self.topk_blocks) * int(self.block_size))


PATCHES = (
    Patch(
        f"{MODELS}.minimax_m3_vl.modeling_minimax_m3_vl",
        "MiniMaxM3VLIndexer.forward",
        _select_blocks,
        "it builds scores of a whole cache as tensors, and selects blocks of it",
    ),
    *(
        Patch(
            f"{MODELS}.{folder}.modeling_{folder}",
            f"{name}.forward",
            _select,
            "it builds scores and masks of a whole cache as tensors",
        )
        for folder, name in INDEXERS.items()
    ),
)
