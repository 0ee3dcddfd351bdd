"""Attention to selected positions (DeepSeek Sparse Attention).

DeepSeek-V3.2 (arXiv 2512.02556, section 2.1) has a lightning indexer beside each attention: it scores the positions
before a token, and attention sees the ``index_topk`` best of them. In a context of no more than ``index_topk`` tokens
that is every position, so attention is exactly dense and the indexer has nothing to say. Beyond it the marker
``moec::selection`` stands for the indexer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moec.errors import UnsupportedModelError

ARGUMENTS = ("indices", "block_indices")
"""Arguments of attention that say what is selected."""


@dataclass(frozen=True)
class Selection:
    """What an indexer gives in a trace where no marker stands for it: the ``top_k`` best positions of each token."""

    top_k: int


def selection_of(arguments: dict[str, Any], max_context: int, owner: str) -> torch.Tensor | None:
    """Take what is selected out of attention's arguments: a marker's result, or nothing where that is everything.

    Raises:
        UnsupportedModelError: something is left out, and no marker says what.
    """
    given = [value for value in (arguments.pop(name, None) for name in ARGUMENTS) if value is not None]
    for value in given:
        if isinstance(value, torch.Tensor):
            return value
        if max_context > value.top_k:
            raise UnsupportedModelError(
                f"{owner} selects {value.top_k} positions of a context of {max_context}",
                "No kernel selects them its way. Contexts that are selected whole are dense attention.",
                f"Compile with --max-context {value.top_k}, or less.",
            )
    return None
