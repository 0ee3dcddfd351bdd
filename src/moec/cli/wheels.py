"""Wheels for a kit: moec without its compiler, TVM without its own, and what both need, for another Python."""

from __future__ import annotations

import base64
import email
import errno
import fnmatch
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import moec
from moec.errors import MissingDependencyError, NetworkError

if TYPE_CHECKING:
    from collections.abc import Iterable

RUNTIME_PACKAGES = (
    "apache-tvm-ffi",
    "attrs",
    "click",
    "jinja2",
    "jsonschema",
    "jsonschema-specifications",
    "markupsafe",
    "numpy",
    "referencing",
    "rpds-py",
    "tokenizers",
    "typing-extensions",
)
"""What the runtime imports, all of it: wheels are installed without looking at their own wishes, since tokenizers
asks for a hub client that nothing here uses."""
SERVE_PACKAGES = (
    "annotated-doc",
    "annotated-types",
    "anyio",
    "fastapi",
    "h11",
    "idna",
    "opentelemetry-api",
    "prometheus-client",
    "pydantic",
    "pydantic-core",
    "starlette",
    "typing-inspection",
    "uvicorn",
)
"""What ``moec serve`` imports besides, all of it."""
CUDA_PACKAGES = ("cuda-bindings>=13,<14", "cuda-pathfinder", "nvidia-cuda-runtime>=13,<14")

PLATFORMS = ("manylinux_2_28", "manylinux_2_24", "manylinux2014", "manylinux_2_17")

TVM_FILES = ("tvm/lib/libtvm_runtime.so", "tvm/lib/libtvm_runtime_cuda.so")
"""Of TVM's package, all that the runtime loads."""
TVM_NOTE = (
    '"""The runtime libraries of Apache TVM, as moec loads them; the compiler is not in this package."""\n'
)

KEPT_FILES = {
    "cuda_bindings": (
        "*.py",
        "cuda/bindings/driver.*.so",
        "cuda/bindings/cydriver.*.so",
        "cuda/bindings/_internal/driver.*.so",
        "cuda/bindings/_internal/utils.*.so",
    ),
    "nvidia_cuda_runtime": ("*/libcudart.so.*",),
}
"""Of large packages, what the runtime loads, beside licenses: the driver's interface; the library that TVM links."""

COMPILER_FILES = (
    "compiler/__init__.py",
    "compiler/lowering/__init__.py",
    "compiler/lowering/targets.py",
)
"""Of the compiler, what ``moec doctor`` uses: plain Python that imports nothing heavy."""
LINKED_FILES = "planning/machine_files/*.json"
"""In a folder that is a link, which a search for all files does not follow."""
DATE = (2020, 1, 1, 0, 0, 0)
"""Of all files in a wheel, so that the same input gives the same bytes."""


@dataclass(frozen=True)
class WheelContents:
    """A wheel before it is written."""

    name: str
    version: str
    tags: tuple[str, ...]
    metadata: str
    files: dict[str, bytes]
    entry_points: str = ""


def download(packages: Iterable[str], python: str, machine: str, folder: Path) -> None:
    """Have pip fetch wheels for Linux and CPython ``python`` (such as ``3.12``) into ``folder``.

    Packages that are installed here come in the same version.

    Raises:
        MissingDependencyError: there is no pip.
        NetworkError: pip did not get them.
        OSError: the disk is full.
    """
    options = ["--only-binary=:all:", "--no-deps", "--implementation=cp", f"--python-version={python}"]
    options += [f"--platform={name}_{machine}" for name in PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", f"--dest={folder}", *options]
    result = subprocess.run([*command, *map(_pinned, packages)], capture_output=True, text=True, check=False)
    if "No module named pip" in result.stderr:
        raise MissingDependencyError(
            "A kit is made with pip, which is not installed.",
            result.stderr.strip(),
            "Install it: python -m ensurepip",
        )
    if os.strerror(errno.ENOSPC) in result.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise NetworkError(
            f"The wheels of the runtime for Python {python} could not be fetched.",
            " ".join(errors) or result.stderr[-500:],
            "Check the network and pip's configuration, and that this Python version exists.",
        )


def moec_wheel() -> WheelContents:
    """The moec that is running, without the compiler."""
    package = Path(moec.__file__).parent
    names = {
        path.relative_to(package).as_posix(): path
        for room in (package, *(path for path in package.iterdir() if path.is_dir()))
        for path in sorted(room.glob("*" if room == package else "**/*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    names |= {path.relative_to(package).as_posix(): path for path in sorted(package.glob(LINKED_FILES))}
    compiler = {
        path.relative_to(package).as_posix() for pattern in COMPILER_FILES for path in package.glob(pattern)
    }
    files = {
        f"moec/{name}": path.read_bytes()
        for name, path in names.items()
        if not name.startswith("compiler/") or name in compiler
    }
    about = importlib.metadata.metadata("moec")
    lines = ["Metadata-Version: 2.1", "Name: moec", f"Version: {about['Version']}"]
    lines += [f"Summary: {about['Summary']}", f"Requires-Python: {about['Requires-Python']}"]
    lines += [
        f"Requires-Dist: {need}" for need in about.get_all("Requires-Dist") or () if "extra ==" not in need
    ]
    scripts = "[console_scripts]\nmoec = moec.__main__:main\n"
    return WheelContents("moec", about["Version"], ("py3-none-any",), "\n".join(lines) + "\n", files, scripts)


def tvm_wheel() -> WheelContents:
    """The runtime libraries of the TVM that is installed, under its own name and version.

    Raises:
        MissingDependencyError: they are not there.
    """
    about = importlib.metadata.distribution("apache-tvm")
    files: dict[str, bytes] = {"tvm/__init__.py": TVM_NOTE.encode()}
    for name in TVM_FILES:
        path = Path(str(about.locate_file(name)))
        if not path.exists():
            raise MissingDependencyError(
                f"The installed apache-tvm has no {name}.",
                f"It was looked for at {path}.",
                "Install it again: pip install --force-reinstall apache-tvm==0.27.0.post1",
            )
        files[name] = path.read_bytes()
    info = f"apache_tvm-{about.version}.dist-info"
    for entry in about.files or ():
        if f"{info}/licenses/" in entry.as_posix():
            files[entry.as_posix()] = Path(str(about.locate_file(entry))).read_bytes()
    kept = (
        "Metadata-Version",
        "Name",
        "Version",
        "Summary",
        "License-Expression",
        "License-File",
        "Project-URL",
    )
    described = email.message_from_string(about.read_text("METADATA") or "")
    lines = [f"{key}: {value}" for key, value in described.items() if key in kept]
    lines.append(f"Requires-Dist: apache-tvm-ffi=={importlib.metadata.version('apache-tvm-ffi')}")
    wheel = email.message_from_string(about.read_text("WHEEL") or "")
    tags = tuple(str(tag) for tag in wheel.get_all("Tag") or ())
    return WheelContents("apache_tvm", about.version, tags, "\n".join(lines) + "\n", files)


def trim(wheel: Path) -> Path:
    """Leave in a wheel what `KEPT_FILES` names of its package, where it names any; the path, which may be another."""
    name, version = wheel.name.split("-")[:2]
    if name not in KEPT_FILES:
        return wheel
    info = f"{name}-{version}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        about = email.message_from_bytes(archive.read(f"{info}WHEEL"))
        metadata = archive.read(f"{info}METADATA").decode()
        files = {
            path: archive.read(path)
            for path in archive.namelist()
            if path.startswith(f"{info}licenses/")
            or any(fnmatch.fnmatchcase(path, pattern) for pattern in KEPT_FILES[name])
        }
    wheel.unlink()
    tags = tuple(str(tag) for tag in about.get_all("Tag") or ())
    return write_wheel(WheelContents(name, version, tags, metadata, files), wheel.parent)


def write_wheel(contents: WheelContents, folder: Path) -> Path:
    """Write a wheel with its METADATA, WHEEL and RECORD; the same contents give the same bytes."""
    info = f"{contents.name}-{contents.version}.dist-info"
    interpreter, abi, _ = contents.tags[0].split("-")
    platforms = ".".join(tag.split("-")[2] for tag in contents.tags)
    path = folder / f"{contents.name}-{contents.version}-{interpreter}-{abi}-{platforms}.whl"
    pure = str(platforms == "any").lower()
    head = ["Wheel-Version: 1.0", "Generator: moec kit", f"Root-Is-Purelib: {pure}"]
    about = [*head, *(f"Tag: {tag}" for tag in contents.tags)]
    files = dict(sorted(contents.files.items()))
    files[f"{info}/METADATA"] = contents.metadata.encode()
    files[f"{info}/WHEEL"] = ("\n".join(about) + "\n").encode()
    if contents.entry_points:
        files[f"{info}/entry_points.txt"] = contents.entry_points.encode()
    record = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, DATE)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return path


def _pinned(package: str) -> str:
    name = package.split(">")[0]
    try:
        return f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
