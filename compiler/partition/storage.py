"""Which weights keep the model's storage type: those that are only multiplied with, or looked up in.

Graphs are traced in float32. A weight matrix is read far more often than it is computed with, so it stays in the
dtype that it was trained in; everything else (norms, biases, tables) is small and widened when it is packed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from moec.compiler.partition.nodes import marker_arguments
from moec.compiler.tracing.markers import ATTENTION, LINEAR, MATRICES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

EMBEDDING = "aten.embedding.default"
LAYOUT_ONLY = frozenset(
    {
        "aten.view.default",
        "aten.reshape.default",
        "aten.transpose.int",
        "aten.permute.default",
        "aten.t.default",
        "aten.slice.Tensor",
        "aten.select.int",
        "aten.unsqueeze.default",
        "aten.squeeze.dim",
        "aten.clone.default",
        "aten.split_with_sizes.default",
        "aten.split.Tensor",
        "<built-in function getitem>",
    }
)
"""Operations that move values and change none."""


def narrow_weights(
    graph: fx.Graph,
    foldable: Collection[fx.Node],
    stored: Callable[[fx.Node], torch.dtype | None],
) -> set[fx.Node]:
    """Give matrices and embedding tables their storage type, in ``graph`` itself.

    Args:
        graph: canonical; of a whole model.
        foldable: nodes that are computed when packing. Those that others use are the weights of segments.
        stored: the storage type of a parameter's placeholder; ``None`` for a constant.

    Returns:
        The narrowed nodes. Their ``meta["val"]`` has the storage type; a looked-up row is widened right away.
    """
    narrowed: set[fx.Node] = set()
    for node in list(foldable):
        readers = [user for user in node.users if user not in foldable]
        if not readers or not all(_reads(user, node) for user in readers):
            continue
        dtype = _common_dtype(node, stored)
        if dtype is None or dtype == node.meta["val"].dtype:
            continue
        node.meta = {**node.meta, "val": node.meta["val"].to(dtype)}
        narrowed.add(node)
        for reader in readers:
            if str(reader.target) == EMBEDDING:
                _widen(graph, reader, dtype)
    return narrowed


def _common_dtype(node: fx.Node, stored: Callable[[fx.Node], torch.dtype | None]) -> torch.dtype | None:
    """The storage type of everything below ``node``, where nothing but layout changes on the way."""
    if node.op in ("placeholder", "get_attr"):
        return stored(node)
    if not _moves(node):
        return None
    found = {_common_dtype(item, stored) for item in node.all_input_nodes}
    return found.pop() if len(found) == 1 else None


def _moves(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target) in LAYOUT_ONLY


def _reads(user: fx.Node, weight: fx.Node) -> bool:
    target = str(user.target)
    if target == LINEAR:
        return user.args[1] is weight and user.args[0] is not weight and weight not in user.args[2:]
    if target == ATTENTION:
        return {weight} <= {item for name, item in marker_arguments(user).items() if name in MATRICES}
    return target == EMBEDDING and user.args[0] is weight


def _widen(graph: fx.Graph, lookup: fx.Node, dtype: torch.dtype) -> None:
    value = lookup.meta["val"]
    lookup.meta = {**lookup.meta, "val": value.to(dtype)}
    with graph.inserting_after(lookup):
        wide = graph.call_function(torch.ops.aten._to_copy.default, (lookup,), {"dtype": value.dtype})
    wide.meta = {**lookup.meta, "val": value}
    lookup.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
