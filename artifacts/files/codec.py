"""Frozen records to JSON values and back, strictly: an unknown, missing or mistyped key is an error."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import TYPE_CHECKING, Any, TypeVar

from moec.artifacts.activation import check_expression

if TYPE_CHECKING:
    from collections.abc import Callable

Record = TypeVar("Record")


def to_json(value: Any) -> Any:
    """A JSON value for a record, or for a tuple, dict or scalar of them.

    Raises:
        ValueError: a number is infinite or not a number; JSON has no word for it.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: to_json(getattr(value, name)) for name in _field_names(type(value))}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} cannot be written as JSON")
    return value


def from_json(record: type[Record], value: Any) -> Record:
    """Read ``record`` from a JSON value.

    Raises:
        ValueError: a key is unknown or missing, or a value is of the wrong type; the message has its path.
    """
    return typing.cast("Record", _read_record(record, value, record.__name__))


@functools.cache
def _reader(kind: Any) -> Callable[[Any, str], Any]:
    """What reads a value of this type, found out once: types are asked for thousands of times in one file."""
    if hasattr(kind, "__supertype__"):
        return _reader(kind.__supertype__)
    if dataclasses.is_dataclass(kind):
        return functools.partial(_read_record, kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return functools.partial(_read_union, arguments)
    if origin is typing.Literal:
        return functools.partial(_read_literal, arguments)
    if origin is tuple:
        return functools.partial(_read_tuple, arguments)
    if origin is dict:
        return functools.partial(_read_dict, _reader(arguments[1]))
    return functools.partial(_read_scalar, kind)


def _read_literal(known: tuple[Any, ...], value: Any, path: str) -> Any:
    same = any(value == option and type(value) is type(option) for option in known)
    return _expect(same, value, f"one of {known}", path)


def _read_dict(read: Callable[[Any, str], Any], value: Any, path: str) -> Any:
    _expect(isinstance(value, dict), value, "an object", path)
    return {key: read(entry, f"{path}.{key}") for key, entry in value.items()}


def _read_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is type(None):
        return _expect(value is None, value, "null", path)
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _expect(number and math.isfinite(value), value, "a finite number", path)
        return float(value)
    assert kind in (str, int, bool), f"the codec has no reader for {kind} at {path}"
    matches = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return _expect(matches, value, kind.__name__, path)


@functools.cache
def _field_names(record: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(record))


@functools.cache
def _field_readers(record: type) -> dict[str, Callable[[Any, str], Any]]:
    hints = typing.get_type_hints(record)
    readers: dict[str, Callable[[Any, str], Any]] = {}
    for field in dataclasses.fields(record):
        by_name = ALIAS_READERS.get(str(field.type))
        readers[field.name] = by_name or _reader(hints[field.name])
    return readers


def _read_record(kind: Any, value: Any, path: str) -> Any:
    _expect(isinstance(value, dict), value, "an object", path)
    readers = _field_readers(kind)
    unknown = sorted(set(value) - set(readers))
    missing = sorted(set(readers) - set(value))
    if unknown:
        raise ValueError(f"{path}: unknown key {', '.join(unknown)}")
    if missing:
        raise ValueError(f"{path}: missing key {', '.join(missing)}")
    return kind(**{name: read(value[name], f"{path}.{name}") for name, read in readers.items()})


@functools.cache
def _kinds(record: type) -> tuple[Any, ...]:
    """The values of a record's field ``kind``, by which it is told from others; none where it has no such field."""
    return typing.get_args(typing.get_type_hints(record).get("kind"))


def _has_kind(value: Any) -> bool:
    return isinstance(value, dict) and "kind" in value


def _read_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    problems: list[str] = []
    for option in options:
        if isinstance(option, type) and dataclasses.is_dataclass(option) and _has_kind(value):
            if value["kind"] not in _kinds(option):
                continue
            return _reader(typing.cast("Any", option))(value, path)
        try:
            return _reader(option)(value, path)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; ".join(problems) or f"{path}: unknown kind {value.get('kind')!r}")


def _read_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    _expect(isinstance(value, list), value, "a list", path)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        read = _reader(arguments[0])
        return tuple(read(item, f"{path}[{i}]") for i, item in enumerate(value))
    _expect(len(value) == len(arguments), value, f"a list of {len(arguments)}", path)
    return tuple(
        _reader(kind)(item, f"{path}[{i}]")
        for i, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def _read_expression(value: Any, path: str) -> Any:
    expression = _freeze(value, path)
    try:
        check_expression(expression)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return expression


def _read_recipe_arguments(value: Any, path: str) -> Any:
    _expect(isinstance(value, list), value, "a list", path)
    return _freeze(value, path)


def _freeze(value: Any, path: str) -> Any:
    """Lists become tuples; an object may only be a reference, ``{"ref": n}``."""
    if isinstance(value, list):
        return tuple(_freeze(item, f"{path}[{i}]") for i, item in enumerate(value))
    if isinstance(value, dict):
        reference = value.get("ref")
        _expect(set(value) == {"ref"}, value, 'an object {"ref": n}', path)
        _expect(isinstance(reference, int) and not isinstance(reference, bool), value, "an integer ref", path)
        return {"ref": reference}
    if isinstance(value, float):
        _expect(math.isfinite(value), value, "a finite number", path)
    return value


ALIAS_READERS: dict[str, Callable[[Any, str], Any]] = {
    "Expression": _read_expression,
    "tuple[RecipeArgument, ...]": _read_recipe_arguments,
}
"""Readers for recursive aliases, by how a record's field spells its type: Python cannot resolve those."""


def _expect(condition: bool, value: Any, expected: str, path: str) -> Any:
    if not condition:
        raise ValueError(f"{path}: expected {expected}, found {value!r}"[:300])
    return value
