"""Attention to selected positions: exact where all are selected, refused where some are not."""

from __future__ import annotations

import pytest

from moec.compiler.trace import trace
from moec.errors import UnsupportedModelError
from tests.support.tiny_models.sparse_attention import SPARSE_ATTENTION


def test_a_context_that_is_not_selected_whole_is_refused() -> None:
    config = SPARSE_ATTENTION["deepseek_v32"]().to_dict() | {"index_topk": 64}
    with pytest.raises(UnsupportedModelError, match="selects 64 positions of a context of 65") as caught:
        trace(config, dtype="float32", max_context=65)
    assert "--max-context 64" in str(caught.value)


def test_a_context_that_is_selected_whole_is_dense_attention() -> None:
    config = SPARSE_ATTENTION["glm_moe_dsa"]().to_dict() | {"index_topk": 64}
    traced = trace(config, dtype="float32", max_context=64)
    assert not any("indexer" in str(node.meta.get("module")) for node in traced.graph.graph.nodes)
