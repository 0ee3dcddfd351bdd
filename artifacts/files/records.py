"""Reading and writing the JSON files of a bundle: strict JSON, its schema, then the record."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from moec import schemas
from moec.artifacts.files.checks import machine_problems
from moec.artifacts.files.codec import from_json, to_json
from moec.artifacts.files.manifest import render_json
from moec.artifacts.machine import MachineRecord
from moec.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

Record = TypeVar("Record")


def parse_json(data: bytes, source: str) -> Any:
    """Strict JSON: no key twice, no NaN.

    Raises:
        BundleError: ``data`` is not JSON; the message names ``source``.
    """
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{source} is not JSON.", f"{error}."[:500], "Copy the bundle again, or compile the model again."
        ) from error


def decode(record: type[Record], schema: str, value: Any, source: str, *, checked: bool = False) -> Record:
    """Check a JSON value against ``schema`` and make a ``record`` of it.

    Args:
        record: the record's type.
        schema: its schema's name.
        value: the JSON value.
        source: the file it came from, for the message.
        checked: the same value was held against the schema before; the record's own types are checked all the same.

    Raises:
        BundleError: it has an unknown or missing key, or a value of the wrong type; the message has the JSON
            path.
    """
    if not checked:
        schemas.validate(schema, value, source)
    try:
        return from_json(record, value)
    except ValueError as error:
        raise BundleError(
            f"{source} cannot be read.",
            f"{error}."[:500],
            "The file was edited or made by another version of moec: compile the model again.",
        ) from error


def read_record(record: type[Record], schema: str, path: Path, *, checked: bool = False) -> Record:
    """Read one JSON file; ``checked`` as for `decode`.

    Raises:
        BundleError: it is not there, not JSON, or not of the form that its schema says.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read.", f"{error.strerror}.", "Check the path.") from error
    return decode(record, schema, parse_json(data, str(path)), str(path), checked=checked)


def write_record(value: Any, path: Path) -> None:
    """Write a record as JSON; equal records give equal bytes."""
    path.write_bytes(render_json(to_json(value)))


def read_machine(path: Path) -> MachineRecord:
    """A machine description, e.g. one of ``examples/machines/``.

    Raises:
        BundleError: as for `read_record`, or its figures contradict each other.
    """
    do = "Give a machine description; examples/machines/ has some to begin with."
    try:
        machine = read_record(MachineRecord, "machine", path)
    except BundleError as error:
        raise BundleError(error.what, error.why, do) from error
    for problem in machine_problems(machine):
        raise BundleError(f"{path} describes no machine.", f"Its {problem}.", do)
    return machine


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)} comes twice")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
