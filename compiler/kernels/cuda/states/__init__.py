"""The functions ``state_<name>``: advance the states of a step's sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.states import STATE_PREFIX, ConvolutionSpec
from moec.compiler.kernels.cpu.states.operands import declare
from moec.compiler.kernels.cuda.states.convolution import convolution
from moec.compiler.kernels.cuda.states.recurrence import recurrence
from moec.compiler.kernels.emit import build

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.states import StateSpec


def state(spec: StateSpec) -> tirx.PrimFunc:
    """The kernel of a state; for its arguments see `moec.compiler.kernels.cpu.states.operands.declare`.

    No kernel of a step writes sequences or positions: they are read before the previous kernel is done.
    """

    def body() -> None:
        operands = declare(spec)
        if isinstance(spec, ConvolutionSpec):
            convolution(spec, operands)
        else:
            recurrence(spec, operands)

    return build(f"{STATE_PREFIX}{spec.name}", body)
