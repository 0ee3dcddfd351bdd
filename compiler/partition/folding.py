"""Second pass: what follows from weights alone is computed once, when packing, by a recipe."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moec.artifacts.ids import TensorName
from moec.artifacts.packing import DenseTensor, RecipeStep
from moec.compiler.packing.tensors.recipes import OPERATIONS
from moec.compiler.partition.canonical import weight_only
from moec.compiler.partition.nodes import DTYPE_NAMES, is_marker, is_symbolic_int, size_bytes
from moec.compiler.partition.storage import narrow_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

GROWTH = 2
"""A folded tensor may be this many times its sources: a router weight cast to float32 is worth it."""


def fold(
    graph: fx.Graph,
    is_weight: Callable[[fx.Node], bool],
    source_name: Callable[[fx.Node], str],
    stored: Callable[[fx.Node], torch.dtype | None],
) -> tuple[dict[fx.Node, DenseTensor], set[fx.Node]]:
    """Find the tensors that segments take as weights.

    Args:
        graph: canonical graph of a whole model.
        is_weight: whether a placeholder is a parameter or buffer.
        source_name: of such a placeholder or of a ``get_attr``: parameter name or ``constant:<name>``.
        stored: storage type of a parameter's placeholder; ``None`` for a constant.

    Returns:
        The weight of each node that stands for one, and the nodes that have no activation among their inputs
        and are no weights: segments compute them anew where they need them.
    """
    known = weight_only(graph, is_weight)
    foldable = {node for node in graph.nodes if node in known and _is_leaf(node)}
    for node in graph.nodes:
        if node in known and not _is_leaf(node) and _can_fold(node, foldable):
            foldable.add(node)
    loose = {node for node in known if node not in foldable}
    for node in graph.nodes:
        if node.op == "call_function" and not node.all_input_nodes:
            loose.add(node)
        elif node.op == "call_function" and node.all_input_nodes and node not in known:
            inputs = [item for item in node.all_input_nodes if not is_symbolic_int(item)]
            if not is_symbolic_int(node) and all(item in loose or item in known for item in inputs):
                loose.add(node)
    narrowed = narrow_weights(graph, foldable, stored)
    narrow_leaves = {leaf for node in narrowed for leaf in _leaves(node)}
    names = _Names()
    dense = {
        node: _recipe(node, source_name, names, frozenset() if node in narrowed else narrow_leaves)
        for node in graph.nodes
        if node in foldable and any(user not in foldable for user in node.users)
    }
    return dense, loose


class _Names:
    """Derived weights are called after their first source: ``weight#1``, ``weight#2``."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def derived(self, source: str) -> str:
        count = self._counts[source] = self._counts.get(source, 0) + 1
        return f"{source}#{count}"


def _is_leaf(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def _can_fold(node: fx.Node, foldable: set[fx.Node]) -> bool:
    if not all(item in foldable for item in node.all_input_nodes):
        return False
    if _operation(node) not in OPERATIONS or set(node.kwargs) - {"dtype", "memory_format", "alpha"}:
        return False
    if node.kwargs.get("alpha", 1) != 1:
        return False
    if not isinstance(node.meta["val"], torch.Tensor):
        return True  # split: its parts are judged
    if any(is_marker(user) for user in node.users):
        return True  # markers take weights, whatever their size
    return size_bytes(node) <= GROWTH * sum(size_bytes(leaf) for leaf in _leaves(node))


def _leaves(node: fx.Node) -> list[fx.Node]:
    """Sources of a node, in the order of first use."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        item = stack.pop()
        if _is_leaf(item):
            found[item] = None
        stack += reversed(item.all_input_nodes)
    return list(found)


def _operation(node: fx.Node) -> str:
    return "getitem" if node.target is operator.getitem else str(node.target)


def _recipe(
    node: fx.Node, source_name: Callable[[fx.Node], str], names: _Names, to_widen: Collection[fx.Node]
) -> DenseTensor:
    """The recipe of ``node``; sources in ``to_widen`` come in their storage type, but are needed in float32."""
    leaves = _leaves(node)
    sources = tuple(source_name(leaf) for leaf in leaves)
    first = sources[0].removeprefix("constant:")
    steps: list[RecipeStep] = []
    places = {leaf: place for place, leaf in enumerate(leaves)}
    for place, leaf in enumerate(leaves):
        if leaf in to_widen:
            steps.append(RecipeStep("aten._to_copy.default", ({"ref": place}, "float32")))
            places[leaf] = len(leaves) + len(steps) - 1

    def visit(item: fx.Node) -> None:
        if item in places:
            return
        for source in item.all_input_nodes:
            visit(source)
        arguments = fx.node.map_arg(item.args, lambda source: {"ref": places[source]})
        if "dtype" in item.kwargs:
            arguments = (*arguments, str(item.kwargs["dtype"]).removeprefix("torch."))
        steps.append(RecipeStep(_operation(item), _plain(arguments)))
        places[item] = len(leaves) + len(steps) - 1

    visit(node)
    value = node.meta["val"]
    return DenseTensor(
        name=TensorName(names.derived(first) if steps else first),
        dtype=DTYPE_NAMES[value.dtype],
        shape=tuple(int(size) for size in value.shape),
        sources=sources,
        steps=tuple(steps),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    return {"ref": int(value["ref"])} if isinstance(value, dict) else value
