"""Relax segment functions to the program of a target: a flat list of calls, each value a place and a shape.

After the passes a segment is straight-line code of three kinds of binding: ``call_tir``, ``reshape`` (and other views),
and tuples. A call becomes a `Call` on its arguments and then its results; a view gives its place another shape; what
the function returns becomes its outputs, and all other results are locals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import tvm
from tvm import relax, sym, tirx

from moec.artifacts.program import Call, LocalSpec, Operand, SegmentProgram
from moec.errors import CompileError

if TYPE_CHECKING:
    from moec.artifacts.program import Shape, Source

VIEWS = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten", "relax.memory.view")
"""Operators whose result has the elements of their first argument in the same order."""


@dataclass(frozen=True)
class _Tensor:
    """A value of the function: which memory it lies in, and how it is seen."""

    place: tuple[str, int]
    """``input``, ``weight`` or ``made``, and a number."""
    dtype: Any
    shape: Shape


_Value: TypeAlias = "_Tensor | tuple[_Value, ...]"


def read_segment(name: str, function: relax.Function, inputs: int, class_name: str) -> SegmentProgram:
    """The program of one segment.

    Args:
        name: of the segment.
        function: after the fuse and schedule passes.
        inputs: how many of its parameters are inputs; the others are weights.
        class_name: the model's class in transformers, for the error message.

    Raises:
        CompileError: the function has something that is neither a call of loops nor a view.
    """
    reader = _Reader(name, class_name)
    for number, parameter in enumerate(function.params):
        place = ("input", number) if number < inputs else ("weight", number - inputs)
        reader.values[parameter] = reader.tensor(place, parameter.ty)
    for block in function.body.blocks:
        for binding in block.bindings:
            reader.values[binding.var] = reader.value(binding.value)
    return reader.program(reader.value(function.body.body))


class _Reader:
    def __init__(self, name: str, class_name: str) -> None:
        self.name, self.class_name = name, class_name
        self.values: dict[Any, _Value] = {}
        self.calls: list[tuple[str, list[_Tensor]]] = []
        self.made: list[_Tensor] = []

    def value(self, expression: Any) -> _Value:
        if isinstance(expression, relax.Var):
            return self.values[expression]
        if isinstance(expression, relax.Tuple):
            return tuple(self.value(field) for field in expression.fields)
        if isinstance(expression, relax.TupleGetItem):
            value = self.value(expression.tuple_value)
            assert isinstance(value, tuple)
            return value[int(expression.index)]
        operator = expression.op.name if isinstance(expression, relax.Call) else type(expression).__name__
        if operator == "relax.call_tir":
            return self._call(expression)
        if operator in VIEWS:
            return self.tensor(self._tensor(expression.args[0]).place, expression.ty)
        raise self._error(operator, "it is neither a call of loops nor a view")

    def tensor(self, place: tuple[str, int], kind: Any) -> _Tensor:
        shape = tuple(self._extent(extent) for extent in kind.shape)
        return _Tensor(place, str(kind.dtype.dtype), shape)

    def program(self, result: _Value) -> SegmentProgram:
        """Give every place its final name, now that the outputs are known."""
        assert isinstance(result, tuple), "a segment returns a tuple"
        outputs = [tensor for tensor in result if isinstance(tensor, _Tensor)]
        assert len(outputs) == len(result), "a segment returns tensors"
        places: dict[tuple[str, int], tuple[Source, int]] = {}
        for number, output in enumerate(outputs):
            if output.place[0] == "made":
                places.setdefault(output.place, ("output", number))
            if output.place[0] == "weight":
                raise self._error(f"output {number}", "it is a weight")
        inner = [tensor for tensor in self.made if tensor.place not in places]
        for number, tensor in enumerate(inner):
            places[tensor.place] = ("local", number)

        def operand(tensor: _Tensor) -> Operand:
            source, number = places.get(tensor.place, tensor.place)
            return Operand(source, number, tensor.dtype, tensor.shape)  # type: ignore[arg-type]

        return SegmentProgram(
            self.name,
            tuple(LocalSpec(tensor.dtype, tensor.shape) for tensor in inner),
            tuple(Call(function, tuple(map(operand, tensors))) for function, tensors in self.calls),
            tuple(map(operand, outputs)),
        )

    def _call(self, call: Any) -> _Value:
        function, arguments, *symbols = call.args
        name = str(function.name_hint)
        if symbols:
            raise self._error(name, "it takes a size that no tensor of its has")
        operands = [self._tensor(argument, name) for argument in arguments.fields]
        (kinds,) = call.ty_args
        several = isinstance(kinds, relax.TupleType)
        results: list[_Tensor] = []
        for kind in kinds.fields if several else [kinds]:
            results.append(self.tensor(("made", len(self.made)), kind))
            self.made.append(results[-1])
        self.calls.append((name, [*operands, *results]))
        return tuple(results) if several else results[0]

    def _tensor(self, expression: Any, operator: str = "a view") -> _Tensor:
        if isinstance(expression, tvm.ir.GenericConst):
            raise self._error(operator, "it reads a constant tensor")
        value = self.value(expression)
        assert isinstance(value, _Tensor)
        return value

    def _extent(self, extent: Any) -> int | str:
        """``8``, ``"T"`` or ``"8T"``."""
        simple = sym.Analyzer().simplify(extent)
        if isinstance(simple, tirx.IntImm):
            return int(simple)
        if isinstance(simple, tirx.Var):
            return "T"
        factors = (simple.a, simple.b) if isinstance(simple, tirx.Mul) else (simple, simple)
        if isinstance(factors[0], tirx.Var) and isinstance(factors[1], tirx.IntImm) and int(factors[1]) > 0:
            return f"{int(factors[1])}T"
        raise self._error(str(extent), "a tensor's extent is no multiple of the tokens of a step")

    def _error(self, operator: str, why: str) -> CompileError:
        return CompileError(
            f"lower failed on {self.name} of {self.class_name} (after trace, partition and fusing): {operator}",
            f"{why}, so it cannot be part of a program.",
            "Report it with the model's name: this needs a loop in compiler/lowering/legalize.py.",
        )
