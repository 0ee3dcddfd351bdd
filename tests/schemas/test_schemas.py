from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from moec import schemas
from moec.artifacts.accuracy import AccuracyRecord
from moec.artifacts.activation import ARITY, VARIABLES
from moec.artifacts.files.codec import from_json, to_json
from moec.artifacts.files.manifest import Manifest
from moec.artifacts.files.records import parse_json
from moec.artifacts.fit import FitRecord
from moec.artifacts.machine import MachineRecord
from moec.artifacts.model import ModelRecord
from moec.artifacts.packing import PackingRecord
from moec.artifacts.program import ProgramRecord
from moec.artifacts.quantization import Quantization
from moec.artifacts.schedule import ScheduleRecord
from moec.errors import BundleError
from tests.support.record_strategies import record

ROOTS: dict[str, type] = {
    "manifest": Manifest,
    "model": ModelRecord,
    "packing": PackingRecord,
    "schedule": ScheduleRecord,
    "program": ProgramRecord,
    "machine": MachineRecord,
    "accuracy": AccuracyRecord,
    "quantization": Quantization,
    "fit": FitRecord,
}
SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
STRUCTURE = (
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "anyOf",
    "enum",
    "const",
    "$ref",
)
APART: dict[Any, str] = {MachineRecord: "machine", Quantization: "quantization", FitRecord: "fit"}
"""Records with a schema of their own that others refer to."""
ALIASES = {
    "Expression": {"$ref": "#/$defs/Expression"},
    "tuple[RecipeArgument, ...]": {"type": "array", "items": {"$ref": "#/$defs/RecipeArgument"}},
}


def expected(kind: Any, found: dict[str, type]) -> Any:
    """The structure that a schema must have for values of type ``kind``; records go to ``found``."""
    if hasattr(kind, "__supertype__"):
        return expected(kind.__supertype__, found)
    if kind in APART:
        return {"$ref": f"urn:moec:schema:{APART[kind]}"}
    if dataclasses.is_dataclass(kind):
        found[typing.cast("type", kind).__name__] = typing.cast("type", kind)
        return {"$ref": f"#/$defs/{typing.cast('type', kind).__name__}"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if all(option in SCALARS for option in arguments):
            return {"type": [SCALARS[option] for option in arguments]}
        return {"anyOf": [expected(option, found) for option in arguments]}
    if origin is typing.Literal:
        return {"const": arguments[0]} if len(arguments) == 1 else {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": expected(arguments[0], found)}
    if origin is dict:
        return {"type": "object", "additionalProperties": expected(arguments[1], found)}
    return {"type": SCALARS[kind]}


def expected_record(kind: type, found: dict[str, type]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    properties = {
        field.name: ALIASES.get(str(field.type)) or expected(hints[field.name], found)
        for field in dataclasses.fields(kind)
    }
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def structure(schema: Any, definitions: dict[str, Any]) -> Any:
    """A schema without descriptions and bounds, and with definitions of plain types (paths) put in place."""
    if not isinstance(schema, dict):
        return schema
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    if name == "Path":
        return structure(definitions[name], definitions)
    kept = {key: value for key, value in schema.items() if key in STRUCTURE}
    for key in ("items", "additionalProperties"):
        if key in kept:
            kept[key] = structure(kept[key], definitions)
    if "anyOf" in kept:
        kept["anyOf"] = [structure(option, definitions) for option in kept["anyOf"]]
    if "properties" in kept:
        kept["properties"] = {key: structure(value, definitions) for key, value in kept["properties"].items()}
    return kept


@pytest.mark.parametrize("name", ROOTS)
def test_schemas_and_records_do_not_drift(name: str) -> None:
    schema = schemas.load(name)
    definitions = schema.get("$defs", {})
    found: dict[str, type] = {}
    assert structure(schema, definitions) == expected_record(ROOTS[name], found)
    seen: set[str] = set()
    while found.keys() - seen:
        kind = (found.keys() - seen).pop()
        seen.add(kind)
        assert structure(definitions[kind], definitions) == expected_record(found[kind], found), kind
    assert set(definitions) - {"Path", "Expression", "RecipeArgument"} == seen


@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_schemas_are_schemas_with_a_description_for_everything(name: str) -> None:
    schema = schemas.load(name)
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:moec:schema:{name}"
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for part in [schema, *schema.get("$defs", {}).values()]:
        assert part["description"]
        for key, entry in part.get("properties", {}).items():
            assert len(entry["description"]) > 1, key


def test_every_schema_file_is_registered() -> None:
    files = {path.name for path in Path(schemas.__file__).parent.glob("*.json")}
    assert files == set(schemas.SCHEMAS.values())
    assert set(ROOTS) == set(schemas.SCHEMAS)


def test_the_expression_schema_knows_every_operator() -> None:
    variables, number, one, two = schemas.load("model")["$defs"]["Expression"]["anyOf"]
    assert variables == {"enum": list(VARIABLES)}
    assert number == {"type": "number"}
    for arity, part in ((1, one), (2, two)):
        assert part["prefixItems"][0]["enum"] == [name for name, count in ARITY.items() if count == arity]
        assert len(part["prefixItems"]) == part["minItems"] == arity + 1


QUICK = settings(max_examples=40, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", ROOTS)
@QUICK
@given(data=st.data())
def test_records_survive_json_and_conform(name: str, data: st.DataObject) -> None:
    value = data.draw(record(ROOTS[name]))
    written = json.dumps(to_json(value), allow_nan=False).encode()
    parsed = parse_json(written, name)
    schemas.validate(name, parsed)
    assert from_json(ROOTS[name], parsed) == value


FREE = (
    "values",
    "tools",
    "files",
    "formats",
    "checkpoint_types",
    "roles",
    "parameter_dtypes",
    "placeholders",
)
"""Keys of maps from names."""


def objects(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every record in a JSON value (maps from names, and references in recipes, are none)."""
    found: list[tuple[Any, ...]] = []
    if isinstance(value, dict):
        free = path and path[-1] in FREE
        found += [] if free or set(value) == {"ref"} else [path]
        for key, item in value.items():
            found += objects(item, (*path, key))
    if isinstance(value, list):
        for place, item in enumerate(value):
            found += objects(item, (*path, place))
    return found


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def both_refuse(name: str, value: Any) -> None:
    with pytest.raises(BundleError, match=r"At \$"):
        schemas.validate(name, value)
    with pytest.raises(ValueError, match=ROOTS[name].__name__):
        from_json(ROOTS[name], value)


@pytest.mark.parametrize("name", ROOTS)
@pytest.mark.parametrize("how", ["unknown key", "missing key", "wrong type"])
@QUICK
@given(data=st.data())
def test_schema_and_codec_refuse_the_same(name: str, how: str, data: st.DataObject) -> None:
    value = to_json(data.draw(record(ROOTS[name])))
    place = at(value, data.draw(st.sampled_from(objects(value))))
    if how == "unknown key":
        place["surprise"] = 1
    else:
        key = data.draw(st.sampled_from(sorted(place)))
        if how == "missing key":
            del place[key]
        else:
            place[key] = {"surprise": [None]}
    both_refuse(name, value)


@pytest.mark.parametrize(
    ("name", "bad"),
    [("packing", {"ref": 0, "other": 1}), ("packing", {"source": 0}), ("packing", {"ref": True})],
)
def test_references_in_recipes_are_checked(name: str, bad: Any) -> None:
    step = {"op": "aten.t", "arguments": [bad]}
    tensor = {
        "name": "a",
        "dtype": "float32",
        "format": None,
        "shape": [1],
        "sources": ["a"],
        "steps": [step],
    }
    value: dict[str, Any] = {
        "config_sha256": "0" * 64,
        "parameter_dtypes": {},
        "dense": [tensor],
        "experts": [],
    }
    value |= {"quantization": None, "fit": None}
    both_refuse(name, value)
    step["arguments"] = [{"ref": 0}]
    schemas.validate(name, value)


@pytest.mark.parametrize(
    "bad", ["gate2", ["silu"], ["silu", "gate", "up"], ["mul", "gate"], [], [1, "gate"], None]
)
def test_activations_are_checked(bad: Any) -> None:
    value = to_json(example_model())
    value["bodies"][0]["activation"] = bad
    both_refuse("model", value)


def example_model() -> ModelRecord:
    from tests.support.tiny_bundle import tiny_model

    return tiny_model()


def test_numbers_that_json_cannot_write() -> None:
    model = example_model()
    attention = dataclasses.replace(model.attentions[0], scaling=float("inf"))
    with pytest.raises(ValueError, match="inf"):
        to_json(dataclasses.replace(model, attentions=(attention,)))
    value = to_json(model)
    value["attentions"][0]["scaling"] = float("nan")
    with pytest.raises(ValueError, match="scaling"):
        from_json(ModelRecord, value)


def test_the_message_has_the_path() -> None:
    value = to_json(example_model())
    value["experts"][1]["top_k"] = "two"
    with pytest.raises(BundleError) as caught:
        schemas.validate("model", value, "somewhere/model.json")
    assert "$.experts[1].top_k" in str(caught.value)
    assert "somewhere/model.json" in caught.value.what
