"""Routed experts while training: one product for each expert, forward and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator


class GroupedProduct(torch.autograd.Function):
    """Rows that lie expert by expert, each times the matrix of its expert."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, ends: list[int]) -> torch.Tensor:
        """One product per expert."""
        ctx.save_for_backward(rows, weight)
        ctx.ends = ends
        out = rows.new_empty(rows.shape[0], weight.shape[1])
        for expert, (low, high) in enumerate(spans(ends)):
            torch.mm(rows[low:high], weight[expert].t(), out=out[low:high])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Two products per expert."""
        rows, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows_grad, weight_grad = torch.empty_like(rows), torch.empty_like(weight)
        for expert, (low, high) in enumerate(spans(ctx.ends)):
            torch.mm(grad[low:high], weight[expert], out=rows_grad[low:high])
            torch.mm(grad[low:high].t(), rows[low:high], out=weight_grad[expert])
        return rows_grad, weight_grad, None


class Dispatch(torch.autograd.Function):
    """Copies every token's row to the places of its choices; the gradient gathers them again."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, source: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The row of the token of every place."""
        ctx.save_for_backward(places)
        return hidden.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Each token's sum over its places."""
        (places,) = ctx.saved_tensors
        return grads[0].index_select(0, places.reshape(-1)).view(*places.shape, -1).sum(1), None, None


class Collect(torch.autograd.Function):
    """The rows at the given places, of which no two are the same."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The rows of the places."""
        ctx.save_for_backward(places)
        ctx.count = rows.shape[0]
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Each gradient row to its place, zeros between."""
        (places,) = ctx.saved_tensors
        grad = grads[0]
        return grad.new_zeros(ctx.count, grad.shape[1]).index_copy_(0, places, grad), None


def spans(ends: list[int]) -> Iterator[tuple[int, int]]:
    """The first row and the one past the last of every expert."""
    return zip([0, *ends[:-1]], ends, strict=True)


def arrange(top_k_index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The token of each row, the row of each choice, and where each expert's rows end.

    The rows of an expert are rounded up to a multiple of 64: products then have few shapes, and the
    library that does them prepares each shape once.
    """
    chosen, order = top_k_index.reshape(-1).sort(stable=True)
    counts = torch.bincount(chosen, minlength=experts)
    rounded = (counts + 63) // 64 * 64
    ends = rounded.cumsum(0)
    shift = (ends - rounded) - (counts.cumsum(0) - counts)
    rows = torch.arange(chosen.numel()) + shift[chosen]
    places = torch.empty_like(order).scatter_(0, order, rows)
    source = order.new_zeros(int(ends[-1])).scatter_(0, rows, order // top_k_index.shape[-1])
    return source, places.view_as(top_k_index), ends.tolist()


def grouped_experts(
    experts: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The routed experts of a layer: rows laid out by expert, one product per expert, and back."""
    source, places, ends = arrange(top_k_index, experts.num_experts)
    rows = Dispatch.apply(hidden, source, places)  # type: ignore[no-untyped-call]
    gate, up = GroupedProduct.apply(rows, experts.gate_up_proj, ends).chunk(2, dim=-1)  # type: ignore[no-untyped-call]
    out = GroupedProduct.apply(functional.silu(gate) * up, experts.down_proj, ends)  # type: ignore[no-untyped-call]
    out = Collect.apply(out, places.reshape(-1)).view(*places.shape, -1)  # type: ignore[no-untyped-call]
    return torch.bmm(top_k_weights.to(out.dtype).unsqueeze(1), out).squeeze(1)
