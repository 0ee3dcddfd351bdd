"""The functions ``state_<name>``: advance the states of a step's sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.states import STATE_PREFIX, ConvolutionSpec
from moec.compiler.kernels.cpu.machine import Machine
from moec.compiler.kernels.cpu.states.convolution import convolution
from moec.compiler.kernels.cpu.states.operands import declare
from moec.compiler.kernels.cpu.states.recurrence import recurrence
from moec.compiler.kernels.emit import build

if TYPE_CHECKING:
    from tvm import tirx

    from moec.artifacts.states import StateSpec


def state(spec: StateSpec, *, lanes: int) -> tirx.PrimFunc:
    """The kernel of a state; for its arguments see `moec.compiler.kernels.cpu.states.operands.declare`.

    Args:
        spec: which state.
        lanes: float32 lanes of the target's vectors (16, 8 or 4).
    """

    def body() -> None:
        machine, operands = Machine(lanes), declare(spec)
        if isinstance(spec, ConvolutionSpec):
            convolution(spec, machine, operands)
        else:
            recurrence(spec, machine, operands)

    return build(f"{STATE_PREFIX}{spec.name}", body)
