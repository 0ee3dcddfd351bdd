"""First pass: drop what does nothing, merge what is equal, and give every weight product its one form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moec.compiler.partition.nodes import is_marker, is_symbolic_int
from moec.compiler.tracing import markers

if TYPE_CHECKING:
    from collections.abc import Callable

ALIASES = (
    "aten.alias.default",
    "aten.detach.default",
    "aten.lift_fresh_copy.default",
    "aten.lift_fresh.default",
)
TRANSPOSE = "aten.transpose.int"
SHAPE_ONLY = ("aten.view.default", "aten.expand.default", "aten.slice.Tensor", "aten.reshape.default")
ASSERTIONS = ("aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten._assert_async.msg")


def canonicalise(graph: fx.Graph, is_weight: Callable[[fx.Node], bool]) -> None:
    """Rewrite ``graph`` in place, to the same values.

    Args:
        graph: of a whole model; placeholders are kept, used or not.
        is_weight: whether a placeholder is a parameter or buffer.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target) in ASSERTIONS:
            graph.erase_node(node)
    _merge_sizes(graph)
    for node in list(graph.nodes):
        _simplify(graph, node)
    _merge_equal(graph)
    weights = weight_only(graph, is_weight)
    for node in list(graph.nodes):
        _to_linear(graph, node, weights)
    graph.eliminate_dead_code()
    _merge_equal(graph)
    graph.eliminate_dead_code()
    graph.lint()


def weight_only(graph: fx.Graph, is_weight: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Nodes whose value follows from weights and buffers alone, placeholders included."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            if node.op == "get_attr" or is_weight(node):
                found.add(node)
        elif node.op == "call_function" and not is_marker(node) and not is_symbolic_int(node):
            inputs = node.all_input_nodes
            if inputs and all(item in found for item in inputs):
                found.add(node)
    return found


def _simplify(graph: fx.Graph, node: fx.Node) -> None:
    if node.op != "call_function":
        return
    target = str(node.target)
    if target == "aten._unsafe_view.default":
        node.target = torch.ops.aten.view.default
        target = "aten.view.default"
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return
    if _changes_nothing(target, node, source):
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    elif target == TRANSPOSE and str(source.target) == TRANSPOSE and _axes(node) == _axes(source):
        node.replace_all_uses_with(source.all_input_nodes[0])
        graph.erase_node(node)


def _axes(node: fx.Node) -> set[int]:
    """The two that a transposition exchanges."""
    axes: tuple[Any, ...] = node.args[1:]
    return {axis % node.meta["val"].dim() for axis in axes}


def _changes_nothing(target: str, node: fx.Node, source: fx.Node) -> bool:
    if target in ALIASES:
        return True
    before, after = source.meta["val"], node.meta["val"]
    if not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
        return False
    if target == "aten.mul.Tensor" and node.args[1] == 1.0:
        return True
    same_shape = [str(size) for size in before.shape] == [str(size) for size in after.shape]
    return same_shape and (target in SHAPE_ONLY or target == "aten._to_copy.default")


def _merge_sizes(graph: fx.Graph) -> None:
    """Read each size off one tensor only: others may then be dead."""
    seen: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and is_symbolic_int(node):
            first = seen.setdefault(str(node.meta["val"]), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _merge_equal(graph: fx.Graph) -> None:
    """Common subexpressions: of equal nodes the first stays."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or is_marker(node):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _key(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_key(item) for item in value)
    if isinstance(value, (dict, slice)):
        items = (
            value.items() if isinstance(value, dict) else (("slice", (value.start, value.stop, value.step)),)
        )
        return tuple((name, _key(item)) for name, item in items)
    return (type(value), value if isinstance(value, fx.Node) else repr(value))


def _to_linear(graph: fx.Graph, node: fx.Node, weights: set[fx.Node]) -> None:
    """``mm(x, w)``, ``bmm(x, w)``, ``addmm(b, x, w)`` with w a weight become ``linear(x, w^T, b)``."""
    target = str(node.target)
    if target not in ("aten.mm.default", "aten.bmm.default", "aten.addmm.default") or node.kwargs:
        return
    arguments: tuple[Any, ...] = node.args
    *bias, x, weight = arguments
    if weight not in weights or x in weights:
        return
    if bias and (bias[0] not in weights or bias[0].meta["val"].dim() != 1):
        return
    value, module = weight.meta["val"], node.meta.get("module", "")
    with graph.inserting_before(node):
        turned = graph.call_function(torch.ops.aten.transpose.int, (weight, -1, -2))
        turned.meta = {"val": value.transpose(-1, -2), "module": module}
        product = graph.call_function(torch.ops.moec.linear.default, (x, turned, *bias))
        product.meta = dict(node.meta)
    assert str(product.target) == markers.LINEAR
    weights.add(turned)
    node.replace_all_uses_with(product)
    graph.erase_node(node)
