"""NVIDIA's fat binary container: machine code and PTX for several architectures in one file, as ``cuobjdump`` sees it.

A container is a 16-byte header (magic, version, header bytes, bytes that follow), then entries: each a header with
its kind, its architecture and the bytes of its payload, and the payload.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moec.errors import CompileError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MAGIC = 0xBA55ED50
CONTAINER = struct.Struct("<IHHQ")
"""Magic, version, bytes of this header, bytes of all entries."""
ENTRY = struct.Struct("<HHIQIIHHIIIQQQ")
"""Kind, version, header bytes, payload bytes, compressed bytes, name offset, minor and major code version,
architecture (e.g. 89), name bytes, reserved, flags, reserved, uncompressed bytes."""

KINDS: dict[str, int] = {"ptx": 1, "elf": 2}
ELF_VERSION = 1, 8
FLAGS_64_BIT_LINUX = 0x11
ENTRY_VERSION = 0x101
ALIGNMENT = 8


@dataclass(frozen=True)
class FatbinEntry:
    """Code for one architecture."""

    kind: Literal["elf", "ptx"]
    architecture: str
    """``sm_89``; for PTX the oldest architecture that it runs on."""
    code: bytes


def write_fatbin(path: Path, entries: Iterable[FatbinEntry]) -> None:
    """Write ``entries`` as one container, uncompressed."""
    body = b"".join(_entry(entry) for entry in entries)
    path.write_bytes(CONTAINER.pack(MAGIC, 1, CONTAINER.size, len(body)) + body)


def architectures(path: Path) -> list[str]:
    """What a fat binary holds: ``sm_NN`` for machine code, ``compute_NN`` for PTX, in its order.

    Raises:
        CompileError: the file is no fat binary.
    """
    names = {"elf": "sm", "ptx": "compute"}
    return [f"{names[entry.kind]}_{entry.architecture.removeprefix('sm_')}" for entry in read_fatbin(path)]


def read_fatbin(path: Path) -> list[FatbinEntry]:
    """Read the entries of a container.

    Raises:
        CompileError: the file is no fat binary, or a damaged one.
    """
    data = path.read_bytes()
    kinds = {number: name for name, number in KINDS.items()}
    try:
        magic, _, header_bytes, body_bytes = CONTAINER.unpack_from(data)
        if magic != MAGIC or header_bytes + body_bytes > len(data):
            raise ValueError("its header is not that of a fat binary")
        entries = []
        position = header_bytes
        while position < header_bytes + body_bytes:
            kind, _, entry_bytes, code_bytes, *rest = ENTRY.unpack_from(data, position)
            start = position + entry_bytes
            architecture = rest[4]
            code = data[start : start + code_bytes]
            entries.append(FatbinEntry("ptx" if kinds[kind] == "ptx" else "elf", f"sm_{architecture}", code))
            position = start + code_bytes
    except (ValueError, KeyError, struct.error) as error:
        raise CompileError(f"{path} is not a fat binary.", str(error), "Compile the module again.") from error
    return entries


def _entry(entry: FatbinEntry) -> bytes:
    code = entry.code + b"\0" * (-len(entry.code) % ALIGNMENT)
    number = int(entry.architecture.removeprefix("sm_"))
    major, minor = ELF_VERSION if entry.kind == "elf" else _ptx_version(entry.code)
    sizes = ENTRY.size, len(code), 0, 0
    header = ENTRY.pack(
        KINDS[entry.kind], ENTRY_VERSION, *sizes, minor, major, number, 0, 0, FLAGS_64_BIT_LINUX, 0, 0
    )
    return header + code


def _ptx_version(code: bytes) -> tuple[int, int]:
    version = re.search(rb"\.version (\d+)\.(\d+)", code)
    assert version is not None, "PTX without a version"
    return int(version[1]), int(version[2])
