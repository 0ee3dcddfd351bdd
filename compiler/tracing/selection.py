"""Attention to selected positions (DeepSeek Sparse Attention), as long as it selects all of them.

DeepSeek-V3.2 (arXiv 2512.02556, section 2.1) has a lightning indexer beside each attention: it scores the positions
before a token, and attention sees the ``index_topk`` best of them. In a context of no more than ``index_topk`` tokens
that is every position, so attention is exactly dense and the indexer has nothing to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.errors import UnsupportedModelError

SELECTIONS = ("indices", "block_indices")
"""Arguments of attention that say what is selected."""


@dataclass(frozen=True)
class Selection:
    """What an indexer gives in a trace: the ``top_k`` best positions of each token, one by one or in blocks."""

    top_k: int


def check_selection(selection: Selection | None, max_context: int, owner: str) -> None:
    """Refuse a selection that leaves something out.

    Raises:
        UnsupportedModelError: sequences may be longer than what is selected.
    """
    if selection is not None and max_context > selection.top_k:
        raise UnsupportedModelError(
            f"{owner} selects {selection.top_k} positions of a context of {max_context}",
            "No kernel attends to selected positions yet. Contexts that are selected whole are dense attention.",
            f"Compile with --max-context {selection.top_k}, or less.",
        )
