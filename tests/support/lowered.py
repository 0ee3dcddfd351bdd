"""Segments lowered but not exported, and their programs run on numpy arrays by whatever calls functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moec.compiler.lowering.lower import import_segments, packed_functions
from moec.compiler.lowering.pipeline import pipeline, run_passes
from moec.compiler.lowering.program import read_segment
from moec.compiler.lowering.targets import parse_target
from moec.runtime.tensors import aligned_empty

if TYPE_CHECKING:
    from moec.artifacts.program import SegmentProgram

STORAGE: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "uint8": np.uint8,
    "bool": np.bool_,
}


@dataclass(frozen=True)
class Lowered:
    """A module before it is code."""

    segments: dict[str, SegmentProgram]
    functions: Any


def lower_segments(functions: Any, model: Any, target: str) -> Lowered:
    """The programs of ``functions`` and what they call, for a target."""
    module = run_passes(import_segments(functions, model), pipeline(parse_target(target)), None)
    inputs = {function.name: len(function.inputs) for function in model.functions}
    segments = {name: read_segment(name, module[name], inputs[name], model.class_name) for name in functions}
    return Lowered(segments, packed_functions(module, tuple(segments.values()), {}))


def sized(shape: tuple[int | str, ...], tokens: int) -> tuple[int, ...]:
    """A shape for so many tokens."""
    return tuple(
        extent if isinstance(extent, int) else int(extent.removesuffix("T") or 1) * tokens for extent in shape
    )


def run_segment(
    segment: SegmentProgram, call: Any, inputs: list[Any], weights: list[Any], outputs: Any, tokens: int
) -> list[Any]:
    """Call by call; what it returns are the outputs."""

    def unwritten(spec: Any) -> NDArray[Any]:
        array = aligned_empty(sized(spec.shape, tokens), STORAGE[spec.dtype])
        array.reshape(-1).view(np.uint8)[...] = 0x7F
        return array

    pools = {
        "input": inputs,
        "weight": weights,
        "output": [unwritten(spec) for spec in outputs],
        "local": [unwritten(spec) for spec in segment.locals],
    }
    for step in segment.calls:
        operands = [
            (pools[item.source][item.number].reshape(sized(item.shape, tokens)), item.dtype)
            for item in step.operands
        ]
        call(step.function, operands)
    return [pools[item.source][item.number] for item in segment.outputs]
