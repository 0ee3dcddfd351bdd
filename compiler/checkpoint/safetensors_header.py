"""The header of a safetensors file: every tensor's element type, shape and place, checked against the file.

Format: 8 bytes little-endian length, that many bytes of JSON, then the tensors without holes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from moec.compiler.checkpoint.record import STORED_BYTES, TensorEntry
from moec.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read the tensors' places from the safetensors file ``path``; no weight is read.

    Raises:
        CheckpointError: the file is unreadable, truncated, or its header is not valid; the message names it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            body = file.read(length) if len(prefix) == 8 and length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}.", str(error), "Check that the file exists and is readable."
        ) from error
    if len(prefix) < 8 or (length <= MAX_HEADER_BYTES and len(body) < length):
        raise _damaged(path, f"It is truncated: {size} bytes are too few for its header.")
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"Its header claims {length} bytes, more than the format's {MAX_HEADER_BYTES}.")
    return _entries(path, _parse(path, body), 8 + length, size)


def _parse(path: Path, body: bytes) -> dict[str, Any]:
    try:
        header = json.loads(body, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"Its header is not valid JSON: {error}.") from error
    if not isinstance(header, dict):
        raise _damaged(path, "Its header is not a JSON object.")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _entries(path: Path, header: dict[str, Any], data: int, size: int) -> dict[str, TensorEntry]:
    entries = {
        name: _entry(path, name, value, data) for name, value in header.items() if name != "__metadata__"
    }
    position = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise _damaged(path, f"Tensor {name} does not begin where the one before it ends.")
        position = entry.end
    if size < position:
        raise _damaged(path, f"It is truncated: {size} bytes of {position}.")
    if size > position:
        raise _damaged(path, f"It has {size - position} bytes after its last tensor.")
    return entries


def _entry(path: Path, name: str, value: Any, data: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"The header's entry for {name} is not dtype, shape and data_offsets.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in STORED_BYTES:
        raise _damaged(path, f"Tensor {name} has element type {dtype!r}, which moec does not read.")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(path, f"Tensor {name} has no valid shape and offsets: {shape!r}, {offsets!r}."[:300])
    begin, end = offsets
    if end - begin != math.prod(shape) * STORED_BYTES[dtype]:
        raise _damaged(path, f"Tensor {name} of {dtype} {shape} does not take {end - begin} bytes.")
    return TensorEntry(path, dtype, tuple(shape), data + begin, data + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a usable safetensors file.", why, "Download or copy this file again."
    )
