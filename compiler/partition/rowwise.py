"""Check that no segment mixes tokens: the tokens of a step may be of different sequences.

Each activation has one axis of tokens. The rules below say for each kind of operation where that axis must
not be. An operation without a rule is refused: better than a wrong answer in a batch.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moec.compiler.partition.nodes import is_marker, is_symbolic_int, place
from moec.compiler.tracing.markers import LINEAR
from moec.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OVER_AXIS = [
    "_softmax",
    "_log_softmax",
    "softmax.int",
    "topk",
    "sort",
    "argsort",
    "cumsum",
    "cumprod",
    "argmax",
    "argmin",
    "gather",
    "scatter.value",
    "scatter.src",
    "max.dim",
    "min.dim",
    "mean.dim",
    "sum.dim_IntList",
    "amax",
    "amin",
    "prod.dim_int",
    "any.dim",
    "var.correction",
    "std.correction",
    "cat",
    "stack",
    "split.Tensor",
    "split_with_sizes",
    "slice.Tensor",
    "select.int",
    "unbind.int",
    "logsumexp",
    "index_select",
    "flip",
]
"""Operations that reduce, order or cut along the axes named ``dim`` (or ``dims``), and no other."""

SHAPING = (
    "view",
    "reshape",
    "permute",
    "transpose.int",
    "unsqueeze",
    "squeeze",
    "expand",
    "t",
    "unflatten",
    "flatten",
)
"""Operations that move elements around as wholes."""

MATRIX = ("mm", "bmm", "matmul", "addmm", "baddbmm")


def check_rowwise(graph: fx.Graph, symbols: Sequence[str], class_name: str) -> None:
    """Refuse a whole model's graph in which a token sees other tokens outside of the markers.

    Args:
        graph: of a whole model.
        symbols: what numbers of tokens are called in its shapes: the decoder's, and an encoder's.
        class_name: of the model.

    Raises:
        UnsupportedModelError: names the module and the operation.
    """
    for node in graph.nodes:
        if node.op != "call_function" or is_marker(node) or is_symbolic_int(node):
            continue
        found = [problem for symbol in symbols if (problem := _problem(node, symbol))]
        problem = found[0] if found else _mixes(node, symbols)
        if problem:
            raise UnsupportedModelError(
                f"{class_name}: {place(node)} {problem}",
                "Sequences are batched by laying their tokens one after the other, so nothing but "
                "attention may look at more than one token.",
                "See `moec models` for the types that compile.",
            )


def token_axes(value: Any, symbol: str) -> tuple[int, ...]:
    """Axes of a tensor whose size depends on the tokens of a step."""
    return tuple(axis for axis, size in enumerate(value.shape) if symbol in str(size))


def _mixes(node: fx.Node, symbols: Sequence[str]) -> str:
    used = [symbol for symbol in symbols if any(_has_tokens(item, symbol) for item in node.all_input_nodes)]
    return "pairs the tokens of two sequences" if len(used) > 1 else ""


def _problem(node: fx.Node, symbol: str) -> str:
    results = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else (node.meta["val"],)
    sources = [item for item in node.all_input_nodes if _has_tokens(item, symbol)]
    if any(len(token_axes(value, symbol)) > 1 for value in results if isinstance(value, torch.Tensor)):
        return "pairs tokens with tokens"
    name = _operation(node)
    if name.startswith("arange") and token_axes(results[0], symbol):
        return "counts the tokens of the step; positions must come from position_ids"
    if not sources:
        return ""
    if any(isinstance(value, torch.Tensor) and not token_axes(value, symbol) for value in results):
        return "combines all tokens"
    if node.target is operator.getitem:
        return ""
    return _rule(name, node)(node, sources, symbol)


def _rule(name: str, node: fx.Node) -> Callable[[fx.Node, list[fx.Node], str], str]:
    if name in OVER_AXIS or name.split(".")[0] in OVER_AXIS:
        return _over_axis
    if name in SHAPING or name.split(".")[0] in SHAPING:
        return _shaping
    if str(node.target) == LINEAR or name.split(".")[0] in MATRIX:
        return _matrix
    if name in ("embedding", "index.Tensor"):
        return _embedding
    if name.split(".")[0] in ("native_layer_norm", "layer_norm"):
        return _layer_norm
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise in tags or name.split(".")[0] in (
        "clone",
        "zeros_like",
        "full_like",
        "ones_like",
        "_to_copy",
    ):
        return _pointwise
    return lambda *_: "is an operation that moec cannot tell to keep tokens apart"


def _pointwise(node: fx.Node, sources: list[fx.Node], symbol: str) -> str:
    result = node.meta["val"]
    (axis,) = token_axes(result, symbol)
    for source in sources:
        value = source.meta["val"]
        if token_axes(value, symbol)[0] - value.dim() != axis - result.dim():
            return "pairs tokens with something else"
    return ""


def _over_axis(node: fx.Node, sources: list[fx.Node], symbol: str) -> str:
    arguments = {item.name: item for item in node.target._schema.arguments}  # type: ignore[union-attr]
    given = dict(zip(arguments, node.args, strict=False)) | dict(node.kwargs)
    name = "dim" if "dim" in arguments else "dims" if "dims" in arguments else ""
    axes = given.get(name, arguments[name].default_value if name else None)
    stacked = _operation(node).startswith("stack")
    for source in sources:
        value = source.meta["val"]
        rank = value.dim() + stacked
        chosen = [axes] if isinstance(axes, int) else list(axes or range(rank))
        if not stacked and token_axes(value, symbol)[0] in [axis % rank for axis in chosen]:
            return "works along the tokens"
    return ""


def _shaping(node: fx.Node, sources: list[fx.Node], symbol: str) -> str:
    before, after = sources[0].meta["val"], node.meta["val"]
    if _operation(node).split(".")[0] not in ("view", "reshape", "flatten", "unflatten"):
        return ""
    rows = [_rows_before(value, symbol) for value in (before, after)]
    return "" if rows[0] == rows[1] else "lays tokens out anew"


def _rows_before(value: Any, symbol: str) -> tuple[int, str]:
    """How many rows of tokens there are, and the size of the tokens' axis: equal on both sides of a view."""
    (axis,) = token_axes(value, symbol)
    rows = 1
    for size in value.shape[:axis]:
        rows *= int(size)
    return rows, str(value.shape[axis])


def _matrix(node: fx.Node, sources: list[fx.Node], symbol: str) -> str:
    left = next(item for item in node.args if isinstance(item, fx.Node))
    for source in sources:
        value = source.meta["val"]
        if source is not left or token_axes(value, symbol)[0] == value.dim() - 1:
            return "multiplies tokens with tokens"
    return ""


def _embedding(node: fx.Node, sources: list[fx.Node], symbol: str) -> str:
    del symbol
    return "looks up in tokens" if node.args[0] in sources else ""


def _layer_norm(node: fx.Node, sources: list[fx.Node], symbol: str) -> str:
    value = sources[0].meta["val"]
    normalised = len(node.args[1])  # type: ignore[arg-type]
    return "normalises over tokens" if token_axes(value, symbol)[0] >= value.dim() - normalised else ""


def _has_tokens(node: fx.Node, symbol: str) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(item, torch.Tensor) and token_axes(item, symbol) for item in values)


def _operation(node: fx.Node) -> str:
    """``aten.mean.dim`` as ``mean.dim``, ``aten.topk.default`` as ``topk``."""
    return str(node.target).removeprefix("aten.").removesuffix(".default")
