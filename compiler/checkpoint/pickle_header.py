"""Where each tensor lies in a file of ``torch.save``: the ``pytorch_model.bin`` of older checkpoints.

Such a file is a zip archive (torch 1.6 and later): ``<name>/data.pkl`` describes the tensors, and each storage is a
member ``<name>/data/<key>``, not compressed, so that its bytes can be read in place like those of a safetensors file.
The description is a pickle. Here it is read by an unpickler that knows the few names a dict of tensors needs, makes
records of them and calls nothing else: a pickle cannot run anything.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from moec.compiler.checkpoint.record import STORED_BYTES, TensorEntry
from moec.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STORAGES = {
    "BFloat16Storage": "BF16",
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "ShortStorage": "I16",
}
"""Torch's storage classes -> element types as safetensors spells them."""

LOCAL_HEADER_BYTES = 30
"""Of a zip member, before its name and extra field; the lengths of those are its last four bytes."""


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    first: int
    """Element of the storage that it begins with."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickled_header(path: Path) -> dict[str, TensorEntry]:
    """Read the tensors' places from the ``torch.save`` file ``path``; no weight is read, and no code is run.

    Raises:
        CheckpointError: the file is unreadable, damaged, of an older format, or holds anything but tensors laid out row
            by row; the message names it.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            folder = _folder(path, archive)
            described = _unpickle(path, archive.read(f"{folder}/data.pkl"))
            places = {
                name.removeprefix(f"{folder}/data/"): (_place(path, file, member), member.file_size)
                for name, member in archive.NameToInfo.items()
                if name.startswith(f"{folder}/data/")
            }
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}.", str(error), "Check that the file exists and is readable."
        ) from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is not a file of torch.save as torch 1.6 and later write it.",
            f"{error}.",
            "Download it again; if it is older than that, load it in transformers and call save_pretrained().",
        ) from error
    return {name: _entry(path, name, tensor, places) for name, tensor in described.items()}


def _folder(path: Path, archive: zipfile.ZipFile) -> str:
    found = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise _damaged(path, "It has no data.pkl.")
    folder = found[0].removesuffix("/data.pkl")
    order = f"{folder}/byteorder"
    if order in archive.NameToInfo and archive.read(order) != b"little":
        raise _damaged(path, "It was written on a big-endian machine.")
    return folder


def _place(path: Path, file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Offset of a member's bytes in the file."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise _damaged(path, f"Its member {member.filename} is compressed.")
    file.seek(member.header_offset)
    header = file.read(LOCAL_HEADER_BYTES)
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return member.header_offset + LOCAL_HEADER_BYTES + name + extra


def _unpickle(path: Path, data: bytes) -> dict[str, _Tensor]:
    try:
        value = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # whatever bytes may make an unpickler raise
        raise _damaged(path, f"Its description cannot be read: {str(error)[:200]}.") from error
    if not isinstance(value, dict):
        raise _damaged(path, "It does not hold a dict of tensors.")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise _damaged(path, f"Its entry {name!r} is no tensor.")
    return value


class _Unpickler(pickle.Unpickler):
    """Knows tensors, parameters, ordered dicts and storages."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in STORAGES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a dict of tensors")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"a {kind!r} is no storage")
        return _Storage(STORAGES[storage], str(key))


def _tensor(
    storage: _Storage, first: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> _Tensor:
    return _Tensor(storage, first, tuple(shape), tuple(stride))


def _parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


def _entry(path: Path, name: str, tensor: _Tensor, places: dict[str, tuple[int, int]]) -> TensorEntry:
    if tensor.storage.key not in places:
        raise _damaged(path, f"The bytes of {name} are missing.")
    begin, available = places[tensor.storage.key]
    size = STORED_BYTES[tensor.storage.dtype]
    expected = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    mixed = any(
        own != wanted and extent > 1
        for own, wanted, extent in zip(tensor.stride, expected, tensor.shape, strict=True)
    )
    if mixed:
        raise _damaged(path, f"Tensor {name} does not lie row by row.")
    first, count = tensor.first * size, math.prod(tensor.shape) * size
    if first + count > available:
        raise _damaged(path, f"Tensor {name} takes more bytes than there are.")
    return TensorEntry(path, tensor.storage.dtype, tensor.shape, begin + first, begin + first + count)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a usable file of torch.save.",
        why,
        "Download or copy it again, or convert the checkpoint: load it in transformers and call save_pretrained().",
    )
