"""What every kernel of a state takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.states import state_inputs, state_output, state_shape, state_weights
from moec.compiler.kernels.emit import Argument, Buffer, Expr, arguments, symbol

if TYPE_CHECKING:
    from moec.artifacts.states import Shape, StateSpec


@dataclass(frozen=True)
class StateOperands:
    """The tensors of one call, flat."""

    inputs: tuple[Buffer, ...]
    """As `moec.artifacts.states.state_inputs` lists them."""
    state: Buffer
    """Of all rows."""
    sequence: Buffer
    position: Buffer
    weights: tuple[Buffer, ...]
    """As `moec.artifacts.states.state_weights` lists them."""
    out: Buffer
    tokens: Expr
    rows: Expr
    """Of the state."""


def declare(spec: StateSpec) -> StateOperands:
    """Declare the arguments of ``state_<name>`` in their order.

    Inputs; ``state [R, ...]``; ``token_sequence [T]`` and ``token_position [T]``, int32; weights; ``out``. All else is
    float32. A sequence's tokens are consecutive in a step, in order of position, and go on where its state is.
    """
    tokens, rows = symbol("T"), symbol("R")

    def shaped(name: str, shape: Shape) -> Argument:
        return Argument(name, tuple(tokens if extent == "T" else extent for extent in shape), "float32")

    inputs, weights = state_inputs(spec), state_weights(spec)
    declared = arguments(
        *(shaped(f"x{number}", shape) for number, shape in enumerate(inputs)),
        Argument("state", (rows, *state_shape(spec)), "float32"),
        Argument("token_sequence", (tokens,), "int32"),
        Argument("token_position", (tokens,), "int32"),
        *(shaped(f"w{number}", shape) for number, shape in enumerate(weights)),
        shaped("out", state_output(spec)),
    )
    count = len(inputs)
    state, sequence, position = declared[count : count + 3]
    return StateOperands(
        tuple(declared[:count]),
        state,
        sequence,
        position,
        tuple(declared[count + 3 : -1]),
        declared[-1],
        tokens,
        rows,
    )
