"""Before all else: tokens get an axis of their own where a model joins heads to it, as in ``x.view(-1, head_dim)``.

Between a token and the others nothing changes, since what is joined lies in a row. But a fused loop then sees T, not a
multiple of it, and a block of a GPU a whole token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

VIEWS = ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
ALONG = ("aten.mean.dim", "aten.sum.dim_IntList", "aten._softmax.default", "aten.amax.default")
COPIES = ("aten._to_copy.default", "aten.clone.default")


def separate_tokens(graph: fx.Graph, tokens: fx.Node) -> None:
    """Rewrite ``[n T, ...]`` as ``[T, n, ...]`` in ``graph``, where that is all there is to do.

    Args:
        graph: of a whole model; what else has such an axis is left as it is, for `check_rowwise` to judge.
        tokens: the placeholder ``[1, T]``.
    """
    count = tokens.meta["val"].shape[1]
    for node in graph.nodes:
        factor = _factor(node, str(count))
        if factor is None or not _keeps_rows(node):
            continue
        value = node.meta["val"]
        shape = [count, factor, *value.shape[1:]]
        node.meta = {**node.meta, "val": value.view(shape)}
        if str(node.target) in VIEWS:
            node.args = (node.args[0], shape)


def _factor(node: fx.Node, symbol: str) -> int | None:
    """The n of a tensor ``[n T, ...]``, where it is not 1."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return None
    first, *rest = (str(size) for size in value.shape)
    factor = first.removesuffix(f"*{symbol}")
    return int(factor) if factor.isdigit() and factor != first and all(map(str.isdigit, rest)) else None


def _keeps_rows(node: fx.Node) -> bool:
    """Whether one more axis behind the first makes no difference to the operation."""
    target: Any = node.target
    if str(target) in (*VIEWS, *COPIES):
        return True
    if str(target) in ALONG:
        axes: Any = node.args[1]
        return all(axis < 0 for axis in (axes if isinstance(axes, (list, tuple)) else [axes]))
    return torch.Tag.pointwise in getattr(target, "tags", ())
