"""Reads a Relax function: operators that are rows become stages, products and all others barriers between them."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

from moec.compiler.kernels.emit import HAND_WRITTEN
from moec.compiler.kernels.linear_shape import LinearShape
from moec.compiler.kernels.rows.stages import (
    Item,
    Key,
    NotRowwise,
    Stage,
    Tensor,
    TopK,
    View,
    parse,
    tensor_of,
)
from moec.compiler.lowering.passes.fuse_rows.records import VIEWS, Barrier, Reading
from moec.errors import CompileError


def read_function(module: Any, function: Any) -> Reading:
    """What is in a Relax function of ``module``.

    Raises:
        CompileError: an operator is neither loops nor one that `records.KEPT` names.
    """
    return _FunctionReader(module).run(function)


class _FunctionReader:
    def __init__(self, module: Any) -> None:
        self.module = module
        self.read = Reading()

    def run(self, function: Any) -> Reading:
        for parameter in function.params:
            self._external(parameter, parameter, 0)
        self.read.weights = frozenset(function.params[int(function.attrs["num_input"]) :])
        (block,) = function.body.blocks
        for binding in block.bindings:
            self._read(binding.var, binding.value)
        self.read.results = self._keys(function.body.body)
        return self.read

    def _keys(self, value: Any) -> list[Key]:
        if isinstance(value, relax.Tuple):
            return [key for item in value.fields for key in self._keys(item)]
        if isinstance(value, tvm.ir.expr.Constant):
            return [self._constant(value)]
        names = self.read.names[value]
        return list(names) if isinstance(names, tuple) else [names]

    def _constant(self, value: Any) -> Key:
        """A number: part of every expression that reads it."""
        key = Item(value, 0)
        if key not in self.read.definitions:
            array = value.value.numpy()
            if array.ndim:
                raise CompileError(f"A segment holds a constant of shape {array.shape}; only numbers can be.")
            self._declare(key, value.ty, 0)
            number = tirx.const(array.item(), str(array.dtype))
            self.read.definitions[key] = Stage(key, self.read.tensors[key], (), number, {})
        return key

    def _external(self, key: Key, value: Any, level: int) -> None:
        self._declare(key, value.ty, level)
        self.read.names[value] = key
        self.read.inputs[key] = value

    def _declare(self, key: Key, kind: Any, level: int) -> None:
        self.read.types[key] = kind
        self.read.levels[key] = level
        try:
            self.read.tensors[key] = tensor_of(kind.shape, kind.dtype.dtype)
        except NotRowwise:
            return

    def _read(self, variable: Any, value: Any) -> None:
        if isinstance(value, (tvm.ir.Var, tvm.ir.expr.Constant, relax.Tuple)):
            keys = self._keys(value)
            self.read.names[variable] = tuple(keys) if isinstance(value, relax.Tuple) else keys[0]
        elif isinstance(value, relax.TupleGetItem):
            self.read.names[variable] = self._keys(value.tuple_value)[value.index]
        elif _name(value) in VIEWS:
            self._view(variable, value)
        elif _name(value) == "relax.topk":
            self._topk(variable, value)
        else:
            self._operator(variable, value)

    def _view(self, variable: Any, value: Any) -> None:
        (source,) = self._keys(value.args[0])
        tensors = self.read.tensors
        self._declare(variable, variable.ty, self.read.levels[source])
        self.read.names[variable] = variable
        if variable in tensors and source in tensors and _same_rows(tensors[variable], tensors[source]):
            self.read.definitions[variable] = View(variable, tensors[variable], source, tensors[source])
        else:
            self.read.aliases[variable] = source

    def _topk(self, variable: Any, value: Any) -> None:
        (source,) = self._keys(value.args[0])
        attributes, rank = value.attrs, len(value.args[0].ty.shape)
        plain = str(attributes.ret_type) == "both" and bool(attributes.largest)
        if not plain or int(attributes.axis) not in (-1, rank - 1) or source not in self.read.tensors:
            raise CompileError(f"A segment uses topk in a way that no router does: {attributes}")
        keys = (Item(variable, 0), Item(variable, 1))
        for key, kind in zip(keys, variable.ty.fields, strict=True):
            self._declare(key, kind, self.read.levels[source])
        tensors = self.read.tensors
        topk = TopK(keys[0], tensors[keys[0]], source, tensors[source], int(attributes.k), keys)
        self.read.definitions.update(dict.fromkeys(keys, topk))
        self.read.names[variable] = keys

    def _operator(self, variable: Any, value: Any) -> None:
        """A call of loops: stages where they are rows, a barrier otherwise."""
        if _name(value) != "relax.call_tir":
            raise CompileError(f"{_name(value) or type(value).__name__} is not lowered to loops.")
        function = self.module[value.args[0]]
        operands = self._keys(value.args[1])
        level = max((self.read.levels[key] for key in operands), default=0)
        fields = list(variable.ty.fields) if isinstance(variable.ty, relax.TupleType) else [variable.ty]
        keys = [Item(variable, number) for number in range(len(fields))]
        self.read.names[variable] = tuple(keys) if isinstance(variable.ty, relax.TupleType) else keys[0]
        if (
            not function.attrs.get(HAND_WRITTEN, False)
            and len(value.args) == 2
            and self._stages(function, operands, keys, fields, level)
        ):
            return
        for key, kind in zip(keys, fields, strict=True):
            self._declare(key, kind, level + 1)
        self.read.barriers.append(Barrier(variable, value, operands, keys, level, LinearShape.of(function)))

    def _stages(self, function: Any, operands: list[Key], keys: list[Item], fields: Any, level: int) -> bool:
        try:
            stages = parse(function, [*operands, *keys], keys[0].variable)
            known = all(key in self.read.tensors for key in operands)
        except NotRowwise:
            return False
        if not known:
            return False
        for key, kind in zip(keys, fields, strict=True):
            self._declare(key, kind, level)
        for stage in stages:
            self.read.definitions[stage.key] = stage
            self.read.tensors[stage.key] = stage.tensor
            self.read.levels[stage.key] = level
        return True


def _name(value: Any) -> str:
    return str(value.op.name) if isinstance(value, relax.Call) and hasattr(value.op, "name") else ""


def _same_rows(one: Tensor, other: Tensor) -> bool:
    """Whether a view keeps every token's row together: the same number of rows lies before the tokens."""
    return _before(one) == _before(other)


def _before(tensor: Tensor) -> int:
    if tensor.token_axis is None:
        return 0
    product = 1
    for extent in tensor.shape[: tensor.token_axis]:
        assert extent is not None
        product *= extent
    return product
