"""A causal convolution of each channel: threads take channels, and go through the step's tokens in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cpu.states.columns import begin, divide
from moec.compiler.kernels.emit import i64, keep, load, loop, store

if TYPE_CHECKING:
    from moec.artifacts.states import ConvolutionSpec
    from moec.compiler.kernels.cpu.machine import Machine
    from moec.compiler.kernels.cpu.states.operands import StateOperands

VECTORS = 4
PARALLEL_CHANNELS = 1 << 12
"""Below this many, one thread is faster than waking others."""


def convolution(spec: ConvolutionSpec, machine: Machine, operands: StateOperands) -> None:
    """Emit the kernel. The state is a window that each token moves on by one."""
    columns = divide(spec.channels, machine, VECTORS)
    (x,), (weight, *bias) = operands.inputs, operands.weights
    channels, past, lanes = i64(spec.channels), spec.width - 1, columns.lanes
    with loop(columns.blocks, parallel=spec.channels > PARALLEL_CHANNELS) as block:
        first = keep(block * i64(columns.width))
        with loop(operands.tokens) as token:
            row = keep(T.cast(load(operands.sequence, token), "int64") * i64(past))
            position = keep(T.cast(load(operands.position, token), "int64"))
            for number in range(columns.vectors):
                channel = keep(first + i64(number * lanes))
                places = [keep((row + i64(tap)) * channels + channel) for tap in range(past)]
                begin(position, operands.state, places, lanes)
                place = keep(token * channels + channel)
                window = [keep(load(operands.state, each, lanes)) for each in places]
                window.append(keep(load(x, place, lanes)))
                result = load(bias[0], channel, lanes) if bias else None
                for tap, value in enumerate(window):
                    product = value * load(weight, i64(tap) * channels + channel, lanes)
                    result = product if result is None else result + product
                store(operands.out, place, result, lanes)
                for each, value in zip(places, window[1:], strict=True):
                    store(operands.state, each, value, lanes)
