"""Bundles whose files are whole and whose records do not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moec.artifacts.files.reader import read_manifest
from moec.artifacts.files.records import parse_json
from moec.errors import BundleError
from tests.support.edited_bundles import edit_json, refuses, reseal


@pytest.mark.parametrize("name", ["model.json", "packing.json", "schedule.json", "modules/cpu/program.json"])
def test_an_unknown_key(bundle: Path, name: str) -> None:
    edit_json(bundle / name, lambda value: value.update(surprise=1))
    refuses(bundle, name, "surprise")


def test_an_unknown_key_deep_inside_is_located(bundle: Path) -> None:
    edit_json(bundle / "model.json", lambda value: value["steps"][1].update(surprise=1))
    refuses(bundle, "$.steps[1]", "surprise")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1, "a": 2}', "NaN", "[" * 100000])
def test_records_that_are_not_json_objects(bundle: Path, text: str) -> None:
    (bundle / "model.json").write_text(text)
    reseal(bundle)
    refuses(bundle, "model.json")


def test_a_doubled_key_is_not_json() -> None:
    with pytest.raises(BundleError, match="comes twice"):
        parse_json(b'{"a": {"b": 1, "b": 1}}', "x")


MODEL_EDITS = {
    "value": lambda model: model["steps"][1].update(inputs=["nothing"]),
    "function": lambda model: model["steps"][1].update(function="nothing"),
    "weight": lambda model: model["steps"][1].update(weights=["nothing"]),
    "0 weights": lambda model: model["steps"][1].update(weights=[]),
    "type or shape": lambda model: model["functions"][0]["weights"][0].update(dtype="float16"),
    "attention": lambda model: model["steps"][2].update(attention="nothing"),
    "operands": lambda model: model["steps"][2].update(value=None),
    "MoE layer": lambda model: model["steps"][3].update(layer=9),
    "expert body": lambda model: model["experts"][0].update(body="nothing"),
    "numbered": lambda model: model["experts"][1].update(layer=2),
    "bytes instead of": lambda model: model["experts"][0].update(experts=9),
    "steps": lambda model: model.update(last_step=99),
    "logits": lambda model: model["steps"].pop(),
    "again": lambda model: model["steps"][2].update(output="q0"),
    "two functions": lambda model: model["functions"].append(model["functions"][0]),
    "computed in float32": lambda model: model["values"]["q0"].update(dtype="bfloat16"),
    "chooses": lambda model: model["experts"][0].update(top_k=9),
}


@pytest.mark.parametrize("word", MODEL_EDITS)
def test_an_inconsistent_model(bundle: Path, word: str) -> None:
    edit_json(bundle / "model.json", MODEL_EDITS[word])
    if word == "bytes instead of":
        edit_json(bundle / "schedule.json", lambda record: widen(record["profile"]["layers"][0]))
    refuses(bundle, word)


def widen(profile: dict[str, Any]) -> None:
    profile["order"].append(8)
    profile["use_share"].append(0.0)
    profile["slot_value"].append(0.0)
    profile["transitions"].append([])


SCHEDULE_EDITS = {
    "slots": lambda record: record["schedules"][1]["layers"][0].update(slots=9),
    "seeds": lambda record: record["schedules"][1]["layers"][0].update(slots=1, seeds=2),
    "not for the MoE layers": lambda record: record["schedules"][1]["layers"].pop(),
    "routing profile": lambda record: record["profile"]["layers"].pop(),
    "rank": lambda record: (
        record["profile"]["layers"][0]["order"].reverse() or record["profile"]["layers"][0]["order"].append(0)
    ),
    "transition": lambda record: record["profile"]["layers"][0]["transitions"][0].append(6),
    "CPU share": lambda record: record["schedules"][0]["layers"][0]["cpu_share"].append(0),
    "prefill": lambda record: record["schedules"][0]["prefill"]["order"].append(0),
    "budget": lambda record: record["schedules"][0]["budgets"].update(host_memory_bytes=10),
}


@pytest.mark.parametrize("word", SCHEDULE_EDITS)
def test_an_inconsistent_schedule(bundle: Path, word: str) -> None:
    edit_json(bundle / "schedule.json", SCHEDULE_EDITS[word])
    refuses(bundle, "schedule.json", word)


def test_an_expert_file_of_the_wrong_size(bundle: Path) -> None:
    with (bundle / "weights/experts-00001.bin").open("ab") as file:
        file.write(bytes(4096))
    reseal(bundle)
    refuses(bundle, "experts-00001.bin has")


def test_a_target_that_names_a_file_that_is_not_listed(bundle: Path) -> None:
    targets = read_manifest(bundle).targets
    reseal(bundle, targets=(dataclasses.replace(targets[0], files=("modules/cpu/none.so",)),))
    refuses(bundle, "modules/cpu/none.so")


def test_a_target_without_a_program(bundle: Path) -> None:
    targets = read_manifest(bundle).targets
    reseal(bundle, targets=(dataclasses.replace(targets[0], files=("modules/cpu/segments.so",)),))
    refuses(bundle, "target cpu has no program.json")


def test_a_program_that_does_not_fit_the_model(bundle: Path) -> None:
    edit_json(bundle / "modules/cpu/program.json", lambda record: record["segments"].pop())
    refuses(bundle, "modules/cpu/program.json", "no segment head")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"not json",
        b"[]",
        b'{"embed": {}}',
        b'{"embed": {"dtype": "F32", "shape": [24, 16], "data_offsets": [0, 99999999]}}',
        b'{"embed": {"dtype": "F8", "shape": [24, 16], "data_offsets": [0, 64]}}',
        b'{"embed": {"dtype": "F32", "shape": [24, -16], "data_offsets": [0, 64]}}',
        b'{"embed": {"dtype": "F32", "shape": [24, 16], "data_offsets": [0, 64]}}',
        b'{"embed": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    ],
)
def test_a_damaged_table_of_dense_tensors(bundle: Path, header: bytes) -> None:
    path = bundle / "weights/dense.safetensors"
    data = path.read_bytes()[4096:]
    padded = header if not header else header + b" " * (4088 - len(header))
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + data)
    reseal(bundle)
    refuses(bundle)
