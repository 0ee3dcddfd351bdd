"""Programs of tiny models, read off their segments without compiling anything."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from moec.artifacts.files.codec import from_json, to_json
from moec.artifacts.model import ModelRecord
from moec.artifacts.program import ProgramRecord
from moec.compiler.lowering.lower import import_segments
from moec.compiler.lowering.pipeline import pipeline, run_passes
from moec.compiler.lowering.program import read_segment
from moec.compiler.lowering.targets import parse_target
from tests.support.graphs import parts
from tests.support.made_once import made_once


@cache
def chain_and_program(name: str, target: str) -> tuple[ModelRecord, ProgramRecord]:
    """The chain of a tiny model and its program, made once for all processes."""
    folder = made_once(f"program-{name}-{target}", lambda empty: _write(name, target, empty))
    chain, program = (json.loads((folder / file).read_text()) for file in ("model.json", "program.json"))
    return from_json(ModelRecord, chain), from_json(ProgramRecord, program)


def _write(name: str, target: str, folder: Path) -> None:
    model, chosen = parts(name, "bfloat16"), parse_target(target)
    module = run_passes(import_segments(model.functions, model.model), pipeline(chosen), None)
    segments = [
        read_segment(spec.name, module[spec.name], len(spec.inputs), model.model.class_name)
        for spec in model.model.functions
    ]
    (folder / "model.json").write_text(json.dumps(to_json(model.model)))
    (folder / "program.json").write_text(json.dumps(to_json(ProgramRecord(tuple(segments), ()))))
