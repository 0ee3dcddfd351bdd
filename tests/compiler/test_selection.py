"""Attention to selected positions: dense where all are selected, else a marker, or refused where there is none."""

from __future__ import annotations

import pytest

from moec.compiler.trace import trace
from moec.compiler.tracing.markers import SELECTION
from moec.errors import UnsupportedModelError
from tests.support.tiny_models.sparse_attention import SPARSE_ATTENTION


def test_blocks_that_are_not_selected_whole_are_refused() -> None:
    config = SPARSE_ATTENTION["minimax_m3_vl_text"]().to_dict() | {"index_topk_blocks": 4}
    with pytest.raises(UnsupportedModelError, match="selects 64 positions of a context of 65") as caught:
        trace(config, dtype="float32", max_context=65)
    assert "--max-context 64" in str(caught.value)


@pytest.mark.parametrize(("context", "markers"), [(64, 0), (65, 1)])
def test_a_context_that_is_selected_whole_is_dense_attention(context: int, markers: int) -> None:
    """Two of the three layers share what the first selects."""
    config = SPARSE_ATTENTION["glm_moe_dsa"]().to_dict() | {"index_topk": 64}
    nodes = trace(config, dtype="float32", max_context=context).graph.graph.nodes
    assert sum(str(node.target) == SELECTION for node in nodes) == markers
    assert any("indexer" in str(node.meta.get("module")) for node in nodes) == bool(markers)
