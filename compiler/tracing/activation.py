"""The element-wise middle of an expert, read off its Python code into an expression."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from moec.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.activation import Expression

WIDTH = 6
"""Intermediate size while reading: any even number would do."""

UNARY = {
    "aten.neg.default": "neg",
    "aten.exp.default": "exp",
    "aten.tanh.default": "tanh",
    "aten.sigmoid.default": "sigmoid",
    "aten.silu.default": "silu",
    "aten.relu.default": "relu",
    "aten.erf.default": "erf",
    "aten.sqrt.default": "sqrt",
}
BINARY = {
    "aten.add.Tensor": "add",
    "aten.add.Scalar": "add",
    "aten.sub.Tensor": "sub",
    "aten.sub.Scalar": "sub",
    "aten.mul.Tensor": "mul",
    "aten.mul.Scalar": "mul",
    "aten.div.Tensor": "div",
    "aten.div.Scalar": "div",
    "aten.pow.Tensor_Scalar": "pow",
    "aten.pow.Tensor_Tensor": "pow",
    "aten.minimum.default": "min",
    "aten.maximum.default": "max",
    "aten.clamp_min.default": "max",
    "aten.clamp_max.default": "min",
}
SAME = ("aten._to_copy.default", "aten.alias.default", "aten.clone.default", "aten.detach.default")
"""Casts change nothing: kernels compute the activation in float32."""


def read_activation(
    function: Callable[[torch.Tensor], torch.Tensor], gated: bool, interleaved: bool, owner: str
) -> Expression:
    """The expression of ``function``.

    Args:
        function: ``[T, 2I] -> [T, I]`` where gated, else ``[T, I] -> [T, I]``.
        gated: the first half (or the even columns) is ``"gate"``, the rest ``"up"``; otherwise all is
            ``"up"``.
        interleaved: gate and up alternate.
        owner: names the model in errors.

    Raises:
        UnsupportedModelError: ``function`` is not element-wise, or uses an operator that no kernel has.
    """
    example = torch.zeros(2, 2 * WIDTH if gated else WIDTH)

    def read(x: torch.Tensor) -> torch.Tensor:  # make_fx miscounts the arguments of bound methods
        return function(x)

    graph = make_fx(read)(example).graph
    reader = _Reader(owner, gated, interleaved)
    for node in graph.nodes:
        reader.read(node)
    return reader.result


class _Reader:
    """Turns nodes into expressions, one after the other."""

    def __init__(self, owner: str, gated: bool, interleaved: bool) -> None:
        self.result: Expression = "up"
        self._owner, self._gated, self._interleaved = owner, gated, interleaved
        self._read: dict[fx.Node, Any] = {}

    def read(self, node: fx.Node) -> None:
        """Read one node; nodes come in order."""
        if node.op == "placeholder":
            self._read[node] = "both" if self._gated else "up"
        elif node.op == "output":
            self.result = self._value(node.args[0])
        else:
            self._read[node] = self._operation(node)

    def _operation(self, node: fx.Node) -> Any:
        target = str(node.target)
        if target.startswith(("aten.split", "aten.slice", "aten.select")) or node.target is operator.getitem:
            return self._half(node)
        if target in SAME:
            return self._read[node.all_input_nodes[0]]
        if target == "aten.gelu.default":
            kind = "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
            return (kind, self._value(node.args[0]))
        if target in UNARY:
            return (UNARY[target], self._value(node.args[0]))
        if target in BINARY:
            return self._binary(BINARY[target], node)
        if target == "aten.clamp.default":
            return self._clamp(node)
        if target == "aten.rsub.Scalar":
            return ("sub", self._value(node.args[1]), self._value(node.args[0]))
        raise self._refuse(f"it uses {target}, which no kernel has")

    def _binary(self, name: str, node: fx.Node) -> Expression:
        left, right = self._value(node.args[0]), self._value(node.args[1])
        alpha = node.kwargs.get("alpha", 1)
        return (name, left, right if alpha == 1 else ("mul", right, self._value(alpha)))

    def _clamp(self, node: fx.Node) -> Expression:
        value, low, high = (*node.args, None, None)[:3]
        low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
        result = self._value(value)
        if low is not None and low != -math.inf:
            result = ("max", result, self._value(low))
        return result if high is None or high == math.inf else ("min", result, self._value(high))

    def _half(self, node: fx.Node) -> Any:
        """Which half of the input a slice is; split gives both, and getitem picks one."""
        target = str(node.target)
        if node.target is operator.getitem:
            return self._read[node.args[0]][node.args[1]]  # type: ignore[index]
        if self._read[node.args[0]] != "both":  # type: ignore[index]
            raise self._refuse("it takes parts of an intermediate result")
        if target.startswith("aten.split") and not self._interleaved:
            sizes = [tuple(part.shape) for part in node.meta["val"]]
            if sizes == [(2, WIDTH), (2, WIDTH)]:
                return ("gate", "up")
        if target == "aten.slice.Tensor":
            columns = tuple(torch.arange(2 * WIDTH).expand(2, -1)[_as_slice(node)][0].tolist())
            whole = tuple(range(2 * WIDTH))
            gate = whole[::2] if self._interleaved else whole[:WIDTH]
            up = whole[1::2] if self._interleaved else whole[WIDTH:]
            known = {whole: "both", gate: "gate", up: "up"}
            if columns in known:
                return known[columns]
        raise self._refuse("it splits gate and up differently from how its weights are laid out")

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            if self._read[argument] in ("both", ("gate", "up")):
                raise self._refuse("it does not tell gate from up")
            return self._read[argument]
        if isinstance(argument, (int, float)):
            return float(argument)
        raise self._refuse(f"it uses the constant {argument!r}")

    def _refuse(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"The activation of {self._owner} cannot be compiled: {why}")


def _as_slice(node: fx.Node) -> tuple[slice, ...]:
    given: tuple[Any, ...] = node.args[1:]
    defaults: tuple[Any, ...] = (0, None, None, 1)
    axis, start, end, step = given + defaults[len(given) :]
    chosen = slice(start, end, step)
    return (slice(None), chosen) if axis in (1, -1) else (chosen,)
