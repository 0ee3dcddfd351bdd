"""One JSON Schema (draft 2020-12) for each JSON file of a bundle: the definition of the format."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import TYPE_CHECKING, Any

from moec.errors import BundleError

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

SCHEMAS: dict[str, str] = {
    "manifest": "manifest.schema.json",
    "model": "model.schema.json",
    "packing": "packing.schema.json",
    "schedule": "schedule.schema.json",
    "program": "program.schema.json",
    "accuracy": "accuracy.schema.json",
    "machine": "machine.schema.json",
    "quantization": "quantization.schema.json",
    "fit": "fit.schema.json",
}
"""Schema name to file; ``<name>.json`` is the file in a bundle that it describes (machines: examples/machines/,
quantization: what ``--quantization FILE`` reads; fit: a part of two others)."""


@functools.cache
def load(name: str) -> dict[str, Any]:
    """The schema called ``name`` (a key of ``SCHEMAS``), as a JSON value; do not change it."""
    text = importlib.resources.files(__name__).joinpath(SCHEMAS[name]).read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def validate(name: str, data: Any, source: str = "") -> None:
    """Check a JSON value against the schema called ``name``.

    Args:
        name: a key of ``SCHEMAS``.
        data: the parsed JSON.
        source: the file it came from, for the message.

    Raises:
        BundleError: it does not conform; the message has the JSON path of the worst place.
    """
    validator = _validator(name)
    if validator.is_valid(data):
        return
    from jsonschema.exceptions import best_match

    problem = best_match(validator.iter_errors(data))
    assert problem is not None, "a value is invalid without an error"
    raise BundleError(
        f"{source or name + '.json'} does not have the form of a {name}.",
        f"At {problem.json_path}: {problem.message}"[:500] + ".",
        "The file was edited or made by another version of moec: compile the model again.",
    )


@functools.cache
def _validator(name: str) -> Validator:
    # Imported here: it takes 0.2 s, and importing the runtime must not.
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource

    resources = [Resource.from_contents(load(known)) for known in SCHEMAS]
    registry: Any = resources @ Registry()
    return Draft202012Validator(load(name), registry=registry)
