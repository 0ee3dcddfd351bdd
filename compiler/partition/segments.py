"""Fourth pass: each group as a graph of activations and weights; equal graphs are one."""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from moec.artifacts.model import FunctionSpec
from moec.compiler.partition.nodes import is_symbolic_int, tensor_spec
from moec.compiler.partition.records import SegmentGraph
from moec.errors import CompileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SHAPED = ("aten.view.default", "aten.expand.default")
"""Operations with the result's shape for an argument."""


@dataclass(frozen=True)
class Segment:
    """A group as a function of its own."""

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    """Activations of the whole graph."""
    weights: tuple[fx.Node, ...]
    """Weight nodes of the whole graph."""
    outputs: tuple[fx.Node, ...]
    """Nodes of the whole graph that others use."""


@dataclass
class Functions:
    """Distinct segments by the hash of their text, named in the order of first use."""

    graphs: dict[str, SegmentGraph]
    specs: dict[str, FunctionSpec]
    _names: dict[str, str]

    @classmethod
    def empty(cls) -> Functions:
        """No functions yet."""
        return cls({}, {}, {})

    def add(self, segment: Segment, symbol: str) -> str:
        """The name of the function that equals ``segment``; a new one where there is none. ``symbol`` is T's name."""
        digest = hashlib.sha256(_text(segment, symbol).encode()).hexdigest()
        if digest not in self._names:
            name = self._names[digest] = f"segment_{len(self._names)}"
            self.specs[name] = FunctionSpec(
                name,
                tuple(tensor_spec(node, symbol) for node in segment.inputs),
                tuple(tensor_spec(node, symbol) for node in segment.weights),
                tuple(tensor_spec(node, symbol) for node in segment.outputs),
            )
            module = fx.GraphModule(torch.nn.Module(), segment.graph)
            self.graphs[name] = SegmentGraph(name, module, symbol)
        return self._names[digest]


def build_segment(
    nodes: tuple[fx.Node, ...],
    outputs: tuple[fx.Node, ...],
    is_weight: Callable[[fx.Node], bool],
    loose: set[fx.Node],
    symbol: str,
) -> Segment:
    """Copy ``nodes``, and the loose nodes they use, into a graph of their own.

    Args:
        nodes: in order.
        outputs: those of ``nodes`` that others use.
        is_weight: whether a node of the whole graph is taken as a weight.
        loose: nodes that have no activation among their inputs and are no weights.
        symbol: T's name.
    """
    own = _with_loose(nodes, loose, is_weight)
    members = set(own)
    used = dict.fromkeys(
        i for n in own for i in n.all_input_nodes if i not in members and not is_symbolic_int(i)
    )
    inputs = tuple(node for node in used if not is_weight(node))
    weights = tuple(node for node in used if is_weight(node))
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for prefix, group in (("x", inputs), ("w", weights)):
        for index, node in enumerate(group):
            copies[node] = graph.placeholder(f"{prefix}{index}")
            copies[node].meta = {"val": node.meta["val"]}
    sizes = _Sizes(graph, symbol, inputs, copies)

    def copied(item: fx.Node) -> Any:
        return sizes.get(item.meta["val"]) if is_symbolic_int(item) else copies[item]

    for node in own:
        arguments, options = fx.node.map_arg((node.args, node.kwargs), copied)
        if str(node.target) in SHAPED:  # a size of -1 would have to be found out again by every reader
            arguments = (arguments[0], [sizes.get(size) for size in node.meta["val"].shape])
        target: Any = node.target
        copies[node] = graph.call_function(target, tuple(arguments), dict(options))
        copies[node].meta = {"val": node.meta["val"], "module": node.meta.get("module", "")}
    graph.output(tuple(copies[node] for node in outputs))
    graph.lint()
    return Segment(graph, inputs, weights, outputs)


class _Sizes:
    """Sizes within a segment: read off an input, or computed from T."""

    def __init__(
        self, graph: fx.Graph, symbol: str, inputs: Iterable[fx.Node], copies: dict[fx.Node, Any]
    ) -> None:
        self._graph, self._symbol = graph, symbol
        self._inputs, self._copies = tuple(inputs), copies
        self._made: dict[str, Any] = {}

    def get(self, value: Any) -> Any:
        """A number, or a node that gives the size."""
        text = str(value)
        if text.lstrip("-").isdigit():
            return int(text)
        if text not in self._made:
            self._made[text] = self._make(value, text)
        return self._made[text]

    def _make(self, value: Any, text: str) -> Any:
        if text == self._symbol:
            return self._read_symbol()
        factor = text.removesuffix(f"*{self._symbol}")
        if not factor.isdigit():
            raise CompileError(
                f"A segment needs the size {text}, which is no multiple of the tokens of a step."
            )
        if self._symbol not in self._made:
            self._made[self._symbol] = self._read_symbol()
        product = self._graph.call_function(operator.mul, (self._made[self._symbol], int(factor)))
        product.meta = {"val": value}
        return product

    def _read_symbol(self) -> Any:
        for source in self._inputs:
            for axis, size in enumerate(source.meta["val"].shape):
                if str(size) == self._symbol:
                    read = self._graph.call_function(
                        torch.ops.aten.sym_size.int, (self._copies[source], axis)
                    )
                    read.meta = {"val": size}
                    return read
        raise CompileError("A segment needs the number of tokens, and none of its inputs has it.")


def _with_loose(
    nodes: tuple[fx.Node, ...], loose: set[fx.Node], is_weight: Callable[[fx.Node], bool]
) -> list[fx.Node]:
    """``nodes`` in order, each after the loose nodes that it uses."""
    result: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node in result:
            return
        for item in node.all_input_nodes:
            if item in loose and not is_weight(item):
                visit(item)
        result[node] = None

    for node in nodes:
        visit(node)
    return list(result)


def _text(segment: Segment, symbol: str) -> str:
    """The graph with names that do not depend on where it was cut from."""
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    for node in segment.graph.nodes:
        names[node] = f"%{len(names)}"
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda item: _Name(names[item]))
        shape = tensor_spec(node, symbol) if node.op == "placeholder" else ""
        lines.append(
            f"{names[node]} {node.op} {node.target if node.op == 'call_function' else ''} {arguments} {shape}"
        )
    return "\n".join(lines)


class _Name(str):
    """A node's name in a text, so that it does not read like a string argument."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
