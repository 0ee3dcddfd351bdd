"""Questions about fx nodes that several passes ask."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moec.artifacts.model import DType, TensorSpec
from moec.compiler.tracing.markers import MARKERS
from moec.compiler.tracing.state_markers import STATES
from moec.errors import CompileError

DTYPE_NAMES: dict[torch.dtype, DType] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}


def is_marker(node: fx.Node) -> bool:
    """Whether graphs are cut here."""
    return node.op == "call_function" and str(node.target) in (*MARKERS, *STATES)


def marker_arguments(node: fx.Node) -> dict[str, Any]:
    """A marker's arguments by name, in the order of its schema."""
    assert is_marker(node)
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return {name: given[name] for name in names}


def is_symbolic_int(node: fx.Node) -> bool:
    """Whether the node is a size, not a tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, int, torch.SymBool, bool))


def tensor_spec(node: fx.Node, symbol: str) -> TensorSpec:
    """Element type and shape of a node; ``CompileError`` where a size is neither a number nor T."""
    value = node.meta["val"]
    shape: list[Any] = []
    for size in value.shape:
        text = str(size)
        if text != symbol and not text.isdigit():
            raise CompileError(
                f"{node.meta.get('module', '')}: {node.target} makes a tensor of shape {tuple(value.shape)}",
                "Between segments a size must be a number, or the tokens of the step.",
            )
        shape.append("T" if text == symbol else int(text))
    return TensorSpec(DTYPE_NAMES[value.dtype], tuple(shape))


def size_bytes(node: fx.Node) -> int:
    """Bytes of a tensor without symbolic sizes."""
    value = node.meta["val"]
    return int(value.numel()) * int(value.element_size())


def place(node: fx.Node) -> str:
    """Where a node is from, for people."""
    return f"{node.meta.get('module') or 'the model'} ({node.target})"
