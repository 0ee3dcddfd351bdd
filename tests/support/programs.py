"""Programs of tiny models, read off their segments without compiling anything."""

from __future__ import annotations

from functools import cache

from moec.artifacts.program import ProgramRecord
from moec.compiler.lowering.lower import import_segments
from moec.compiler.lowering.pipeline import pipeline, run_passes
from moec.compiler.lowering.program import read_segment
from moec.compiler.lowering.targets import parse_target
from tests.support.graphs import parts


@cache
def program(name: str, target: str) -> ProgramRecord:
    """The program of a tiny model, made once; nobody changes it."""
    model, chosen = parts(name, "bfloat16"), parse_target(target)
    module = run_passes(import_segments(model.functions, model.model), pipeline(chosen), None)
    segments = [
        read_segment(spec.name, module[spec.name], len(spec.inputs), model.model.class_name)
        for spec in model.model.functions
    ]
    return ProgramRecord(tuple(segments), ())
