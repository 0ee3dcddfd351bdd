"""MoE layers whose experts have a capacity, and choices that exceed it."""

from __future__ import annotations

import torch

from moec.artifacts.ids import LayerId
from moec.artifacts.model import ExpertsLayer

CAPACITIES = [
    ExpertsLayer(LayerId(0), "m", "b", 5, 1, 3),
    ExpertsLayer(LayerId(0), "m", "b", 131, 1, 3),
    ExpertsLayer(LayerId(0), "m", "b", 6, 2, 4),
    ExpertsLayer(LayerId(0), "m", "b", 7, 2, 0, 0.3),
    ExpertsLayer(LayerId(0), "m", "b", 6, 3, 0, 0.4),
]
"""Top-1 and more, a number of tokens and a share of a call's."""
CROWDED = 6
"""Experts that are chosen among, so that they have more tokens than they take."""


def drawn_choices(layer: ExpertsLayer, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts ``[T, K]``, different ones for each token and spread over all, and their weights ``[T, K]``."""
    generator = torch.Generator().manual_seed(layer.experts)
    few = min(layer.experts, CROWDED)
    order = torch.rand(tokens, few, generator=generator).argsort(-1)[:, : layer.top_k]
    return order * (layer.experts // few), torch.rand(tokens, layer.top_k, generator=generator) + 0.1
