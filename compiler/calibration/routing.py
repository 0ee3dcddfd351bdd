"""How narrowly routers decide, and what it costs where rounding turns a decision round.

T tokens, E experts, K chosen. A router's *gap* is how far the last chosen expert is ahead of the first that is not. A
change of the scores by noise of deviation s swaps the two where the gap is below about s: with a density r of gaps at
zero that is ``r s / sqrt(2 pi)`` of the tokens. What a swap costs is of the order of what the last chosen expert
contributes: the square of ``weight x d likelihood / d weight``.
"""

from __future__ import annotations

import torch

NARROW = 0.2
"""The share of tokens that the density of gaps at zero is read off."""


def gaps(scores: torch.Tensor, top_k: int) -> torch.Tensor | None:
    """``[T]`` of scores ``[..., T, E]`` that ``top_k`` are chosen by; None where all are."""
    if top_k >= scores.shape[-1]:
        return None
    best = torch.topk(scores.reshape(-1, scores.shape[-1]), top_k + 1, dim=-1).values
    return best[:, -2] - best[:, -1]


def swap_cost(weight: torch.Tensor, gradient: torch.Tensor) -> float:
    """Nats a token that exchanging the last choice costs, from ``weight [T, K]`` and the likelihood's gradient."""
    return float((weight[:, -1] * gradient[:, -1]).square().mean())


def gap_seeds(found: torch.Tensor, cost: float, seed: int) -> torch.Tensor:
    """What to send back from gaps ``[T]``: signs that are drawn, times density and cost.

    The mean square of (gradient x change) over such draws is then that of ``density x cost x change of the gap``, added
    up over tokens and layers.
    """
    finite = found.detach()[torch.isfinite(found.detach())]
    if not len(finite):
        return torch.zeros_like(found)
    density = NARROW / max(float(torch.quantile(finite, NARROW)), 1e-12)
    draw = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(0, 2, found.shape, generator=draw) - 1.0
    return torch.where(torch.isfinite(found.detach()), signs * density * cost, 0.0)
