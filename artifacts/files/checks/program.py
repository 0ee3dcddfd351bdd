"""Whether a target's program fits the model that it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.files.checks.names import repeated
from moec.artifacts.layout.cache import SELECTION_PREFIX
from moec.artifacts.model import TensorSpec
from moec.artifacts.program import size_bytes
from moec.artifacts.states import STATE_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moec.artifacts.model import FunctionSpec, ModelRecord
    from moec.artifacts.program import LocalSpec, Operand, ProgramRecord, SegmentProgram


def program_problems(model: ModelRecord, program: ProgramRecord) -> Iterator[str]:
    """What in a ``program.json`` is inconsistent, or does not fit ``model``, one sentence each."""
    names = [segment.name for segment in program.segments]
    functions = {function.name: function for function in model.functions}
    yield from (f"there are two segments called {name}" for name in repeated(names))
    yield from (f"there is no segment {name}" for name in functions if name not in names)
    for segment in program.segments:
        if segment.name not in functions:
            yield f"the model has no function {segment.name}"
            continue
        problems = _segment_problems(functions[segment.name], segment)
        yield from (f"{segment.name} {problem}" for problem in problems)
    yield from _beside_problems(model, program, names)
    called = {call.function for segment in program.segments for call in segment.calls}
    called |= {f"attention_{spec.name}" for spec in model.attentions}
    called |= {f"{SELECTION_PREFIX}{spec.name}" for spec in model.selections}
    called |= {f"{STATE_PREFIX}{spec.name}" for spec in model.states}
    called |= {f"experts_{body.name}" for body in model.bodies}
    wanting = [workspace.function for workspace in program.workspaces]
    yield from (f"there are two workspaces for {name}" for name in repeated(wanting))
    yield from (
        f"there is a workspace for {name}, which is not called" for name in wanting if name not in called
    )


def _beside_problems(model: ModelRecord, program: ProgramRecord, segments: list[str]) -> Iterator[str]:
    bodies = {body.name for body in model.bodies}
    for each in program.beside:
        if each.body not in bodies:
            yield f"{each.function} is for the unknown expert body {each.body}"
        if each.segment not in segments:
            yield f"{each.function} is for the unknown segment {each.segment}"
    pairs = [f"{each.body} and {each.segment}" for each in program.beside]
    yield from (f"there are two functions for {pair}" for pair in repeated(pairs))


def _segment_problems(function: FunctionSpec, segment: SegmentProgram) -> Iterator[str]:
    known: dict[str, Sequence[TensorSpec | LocalSpec]] = {
        "input": function.inputs,
        "weight": function.weights,
        "output": function.outputs,
        "local": segment.locals,
    }
    touched: set[tuple[str, int]] = set()
    for number, call in enumerate(segment.calls):
        if not call.operands:
            yield f"calls {call.function} on nothing (call {number})"
        for operand in call.operands:
            problem = _operand_problem(operand, known)
            if problem:
                yield f"calls {call.function} (call {number}) on {problem}"
            touched.add((operand.source, operand.number))
    yield from _output_problems(function, segment, known, touched)


def _output_problems(
    function: FunctionSpec,
    segment: SegmentProgram,
    known: dict[str, Sequence[TensorSpec | LocalSpec]],
    touched: set[tuple[str, int]],
) -> Iterator[str]:
    if len(segment.outputs) != len(function.outputs):
        yield f"has {len(segment.outputs)} outputs instead of {len(function.outputs)}"
        return
    for number, (operand, spec) in enumerate(zip(segment.outputs, function.outputs, strict=True)):
        problem = _operand_problem(operand, known)
        if problem or (operand.dtype, operand.shape) != (spec.dtype, spec.shape):
            yield f"has output {number} in {problem or 'a tensor of another type or shape'}"
        elif operand.source in ("local", "weight"):
            yield f"has output {number} in a {operand.source} tensor"
        elif operand.source == "output" and operand.number != number:
            place = segment.outputs[operand.number]
            if (place.source, place.number) != ("output", operand.number):
                yield f"has output {number} in output {operand.number}, which has no memory of its own"
        elif operand.source == "output" and ("output", number) not in touched:
            yield f"has no call that makes output {number}"


def _operand_problem(operand: Operand, known: dict[str, Sequence[TensorSpec | LocalSpec]]) -> str | None:
    tensors = known[operand.source]
    if operand.number >= len(tensors):
        return f"{operand.source} {operand.number} of {len(tensors)}"
    given = tensors[operand.number]
    tensor = given.stored if isinstance(given, TensorSpec) else given
    same = size_bytes(operand.dtype, operand.shape) == size_bytes(tensor.dtype, tensor.shape)
    if operand.dtype != tensor.dtype or not same:
        return f"a view of {operand.source} {operand.number} that is not of its type and size"
    return None
