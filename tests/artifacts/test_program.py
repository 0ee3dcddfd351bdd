"""Whether what is wrong in a program is noticed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moec.artifacts.files.checks import program_problems
from moec.artifacts.program import (
    Call,
    Operand,
    ProgramRecord,
    SegmentProgram,
    Workspace,
    resolve,
    size_bytes,
)
from tests.support.tiny_bundle import H, tiny_model, tiny_program

MODEL = tiny_model()
PROGRAM = tiny_program(MODEL)


def changed(name: str, /, **fields: Any) -> ProgramRecord:
    """The program with a segment replaced."""
    segments = [
        dataclasses.replace(segment, **fields) if segment.name == name else segment
        for segment in PROGRAM.segments
    ]
    return dataclasses.replace(PROGRAM, segments=tuple(segments))


def segment(name: str) -> SegmentProgram:
    return next(segment for segment in PROGRAM.segments if segment.name == name)


def with_operand(operand: Operand) -> ProgramRecord:
    calls = segment("layer_2").calls
    return changed("layer_2", calls=(*calls, Call("more", (operand,))))


def test_a_consistent_program_has_no_problems() -> None:
    assert list(program_problems(MODEL, PROGRAM)) == []
    view = Operand("output", 0, "float32", ("2T", 4, 2))
    assert list(program_problems(MODEL, with_operand(view))) == []


@pytest.mark.parametrize(
    ("operand", "why"),
    [
        (Operand("local", 1, "float32", ("T", H)), "local 1 of 1"),
        (Operand("input", 0, "float32", ("T", 8)), "not of its type and size"),
        (Operand("input", 0, "float32", (H,)), "not of its type and size"),
        (Operand("input", 0, "int64", ("T", 8)), "not of its type and size"),
        (Operand("weight", 0, "float32", ("16T", H)), "not of its type and size"),
        (Operand("output", 9, "float32", ("T", H)), "output 9 of 5"),
    ],
)
def test_operands_are_views_of_what_is_there(operand: Operand, why: str) -> None:
    (problem,) = program_problems(MODEL, with_operand(operand))
    assert "calls more (call 1) on" in problem
    assert why in problem


OUTPUTS = segment("layer_2").outputs


@pytest.mark.parametrize(
    ("place", "why"),
    [
        (Operand("local", 0, "float32", (1, "T", 2, 8)), "in a local tensor"),
        (Operand("output", 2, "float32", (1, "T", 16)), "another type or shape"),
        (Operand("output", 3, "float32", (1, "T", 2, 8)), "not of its type and size"),
        (Operand("output", 0, "float32", (1, "T", 2, 8)), ""),
        (Operand("input", 0, "float32", (1, "T", 2, 8)), ""),
    ],
)
def test_outputs_lie_where_they_can(place: Operand, why: str) -> None:
    program = changed("layer_2", outputs=(*OUTPUTS[:2], place, *OUTPUTS[3:]))
    problems = list(program_problems(MODEL, program))
    assert len(problems) == bool(why)
    assert why in "".join(problems)


def test_a_view_of_an_output_that_is_a_view_itself() -> None:
    first, second = (Operand("output", number, "float32", (1, "T", 2, 8)) for number in (1, 2))
    program = changed("layer_2", outputs=(first, second, *OUTPUTS[2:]))
    (problem,) = program_problems(MODEL, program)
    assert "output 0 in output 1, which has no memory of its own" in problem


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (dataclasses.replace(PROGRAM, segments=PROGRAM.segments[1:]), "no segment embed"),
        (
            dataclasses.replace(PROGRAM, segments=(*PROGRAM.segments, segment("head"))),
            "two segments called head",
        ),
        (changed("head", name="feet"), "no segment head"),
        (changed("head", calls=()), "no call that makes output 0"),
        (changed("head", outputs=()), "0 outputs instead of 1"),
        (changed("head", calls=(*segment("head").calls, Call("f", ()))), "calls f on nothing"),
        (
            dataclasses.replace(PROGRAM, workspaces=(Workspace("f", 1, 2),)),
            "workspace for f, which is not called",
        ),
        (
            dataclasses.replace(PROGRAM, workspaces=(Workspace("loops", 1, 2), Workspace("loops", 1, 2))),
            "two workspaces for loops",
        ),
    ],
)
def test_what_does_not_fit_the_model(program: ProgramRecord, why: str) -> None:
    assert why in next(program_problems(MODEL, program))


def test_workspaces_of_kernels_and_loops_are_known() -> None:
    names = ("loops", "attention_attn", "experts_e8")
    program = dataclasses.replace(PROGRAM, workspaces=tuple(Workspace(name, 64, 16) for name in names))
    assert list(program_problems(MODEL, program)) == []
    assert program.workspaces[0].at(3) == 64 + 3 * 16


def test_extents_are_multiples_of_the_tokens_of_a_step() -> None:
    assert resolve((1, "T", "16T", 4), 3) == (1, 3, 48, 4)
    assert size_bytes("float16", (1, "T", "16T", 4)).at(3) == 2 * 3 * 48 * 4
    assert size_bytes("int64", (5,)).at(1000) == 40
