"""The dense segments of a step as their program says, on torch's tensors: each call can be run by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moec.artifacts.program import resolve
from moec.artifacts.steps import SegmentStep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.kernels.module import Module
    from moec.artifacts.model import FunctionSpec, ModelRecord
    from moec.artifacts.program import Call, Operand, SegmentProgram

DEVIATION = 0.02
TOKEN_IDS = 100
"""Token ids and positions are drawn below it."""


@dataclass(frozen=True)
class BoundCall:
    """A call of a program."""

    call: Call
    run: Callable[[], None]

    @property
    def products(self) -> tuple[Operand, ...]:
        """The matrices of 16 bits that it reads whole; none where it looks rows up by token."""
        operands = self.call.operands
        if any(operand.dtype == "int64" and operand.source == "input" for operand in operands):
            return ()
        return tuple(
            operand
            for operand in operands
            if operand.source == "weight"
            and operand.dtype in ("bfloat16", "float16")
            and len(operand.shape) > 1
        )

    @property
    def product_bytes(self) -> int:
        """Of those matrices."""
        return 2 * sum(math.prod(int(extent) for extent in operand.shape) for operand in self.products)


class SegmentRun:
    """One segment with memory of its own.

    Args:
        module: has the functions.
        name: of the segment.
        tokens: T.
        share: operands of another run of the same segment, to be read here too.
    """

    def __init__(self, module: Module, name: str, tokens: int, share: SegmentRun | None = None) -> None:
        spec = next(function for function in module.model.functions if function.name == name)
        program = next(segment for segment in module.program.segments if segment.name == name)
        self._module, self._tokens = module, tokens
        self._places: dict[tuple[str, int], torch.Tensor] = {}
        if share is None:
            self._fill(spec)
        else:
            given = {place: t for place, t in share._places.items() if place[0] in ("input", "weight")}
            self._places |= {place: tensor.to(module.device) for place, tensor in given.items()}
        self._make_room(spec, program)
        self.calls = [BoundCall(call, self._bind(call)) for call in program.calls]
        self.outputs = [self._tensor(operand) for operand in program.outputs]

    def run(self) -> None:
        """All calls, in order."""
        for call in self.calls:
            call.run()

    def poison(self) -> None:
        """Fill what the segment writes with what is not a number."""
        for (source, _), tensor in self._places.items():
            if source in ("local", "output"):
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    def _fill(self, spec: FunctionSpec) -> None:
        device = self._module.device
        for number, value in enumerate(spec.inputs):
            shape = resolve(value.shape, self._tokens)
            if value.dtype == "float32":
                self._places["input", number] = torch.randn(shape, device=device)
            else:
                dtype = getattr(torch, value.dtype)
                self._places["input", number] = torch.randint(0, TOKEN_IDS, shape, device=device).to(dtype)
        for number, weight in enumerate(spec.weights):
            tensor = torch.empty(resolve(weight.shape, 1), dtype=getattr(torch, weight.dtype), device=device)
            self._places["weight", number] = tensor
            if len(weight.shape) > 1:
                tensor.normal_(0, DEVIATION)
            else:
                tensor.uniform_(0.5, 1.5)

    def _make_room(self, spec: FunctionSpec, program: SegmentProgram) -> None:
        for number, local in enumerate(program.locals):
            self._allocate("local", number, local.dtype, resolve(local.shape, self._tokens))
        for number, output in enumerate(spec.outputs):
            self._allocate("output", number, output.dtype, resolve(output.shape, self._tokens))

    def _allocate(self, source: str, number: int, dtype: str, shape: tuple[int, ...]) -> None:
        self._places[source, number] = torch.empty(
            shape, dtype=getattr(torch, dtype), device=self._module.device
        )

    def _tensor(self, operand: Operand) -> torch.Tensor:
        return self._places[operand.source, operand.number].view(resolve(operand.shape, self._tokens))

    def _bind(self, call: Call) -> Callable[[], None]:
        return self._module.bind(call.function, *map(self._tensor, call.operands), tokens=self._tokens)


def step_segments(model: ModelRecord, most: int | None = None, last: bool = True) -> list[str]:
    """The segments of a step in order, each at most ``most`` times; without those of ``last_step`` unless ``last``."""
    names: list[str] = []
    for number, step in enumerate(model.steps):
        if not isinstance(step, SegmentStep) or (number >= model.last_step and not last):
            continue
        if most is None or names.count(step.function) < most:
            names.append(step.function)
    return names


def product_calls(runs: Sequence[SegmentRun]) -> list[BoundCall]:
    """The calls that multiply with a matrix, in order."""
    return [call for run in runs for call in run.calls if call.products]
