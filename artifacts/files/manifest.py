"""``manifest.json``: what a bundle is, and the size and SHA-256 of every other file in it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from moec.artifacts.files.codec import to_json
from moec.artifacts.fit import FitRecord  # noqa: TC001 - the codec reads the types of records

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FORMAT_VERSION = 1
"""The format that this moec writes, and the newest that it reads."""

MANIFEST_NAME = "manifest.json"

NO_SHA256 = "0" * 64
"""Stands in the manifest for its own SHA-256 while that is computed."""

Contents: TypeAlias = Literal["bundle", "modules"]


@dataclass(frozen=True)
class FileRecord:
    """One file, as it must be found."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class TargetRecord:
    """One compiled target, in ``modules/<name>/``."""

    name: str
    kind: Literal["cpu", "cuda"]
    architectures: tuple[str, ...]
    """A CPU's instruction sets (``x86-64-v4``) or CUDA architectures (``sm_89``) that the machine code is for."""
    cpu_features: tuple[str, ...]
    """Flags of /proc/cpuinfo that the machine must have."""
    files: tuple[str, ...]
    interface: str
    """What its kernels and the host share in memory, see `moec.artifacts.words.interface`."""


@dataclass(frozen=True)
class TokenizerRecord:
    """The checkpoint's tokenizer, in ``tokenizer/``."""

    files: tuple[str, ...]
    chat_template: bool
    """Whether the tokenizer's files define a chat template."""


@dataclass(frozen=True)
class Manifest:
    """The whole of ``manifest.json``. No clock is in it: the same input gives the same bytes."""

    format_version: int
    contents: Contents
    """``modules``: no weights and no schedule, made by ``moec compile --modules-only`` for ``moec pack``."""
    moec_version: str
    tools: dict[str, str]
    """Versions of the packages that made it."""
    model_name: str
    """As the person gave it: a hub id, or the last part of a path."""
    fingerprint: str
    """Of the checkpoint's config and tensor table; see ``model_fingerprint``."""
    targets: tuple[TargetRecord, ...]
    tokenizer: TokenizerRecord | None
    quantization: str
    """Name of the policy that formats of weights follow; ``none`` where all are plain."""
    formats: dict[str, int]
    """Bytes of weights in each format or plain element type."""
    fit: FitRecord | None
    """What formats were chosen for and by, with ``moec compile --fit``; None: somebody named them."""
    checkpoint_types: dict[str, int]
    """Bytes of the checkpoint's tensors in each type, as its files call them (``BF16``, ``F8_E4M3``, ``Q4_K``)."""
    files: dict[str, FileRecord]
    """By path relative to the bundle, ``/`` between folders; every file but the manifest itself."""
    manifest_sha256: str
    """Of this file with these 64 digits replaced by zeros."""


def model_fingerprint(config_sha256: str, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> str:
    """SHA-256 (hexadecimal) that tells models apart without reading weights.

    Args:
        config_sha256: of the checkpoint's canonical config.
        tensors: name to dtype (as in safetensors, e.g. ``BF16``) and shape, of every tensor in the
            checkpoint.
    """
    table = [[name, dtype, list(shape)] for name, (dtype, shape) in sorted(tensors.items())]
    text = json.dumps([config_sha256, table], separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def render_json(value: Any) -> bytes:
    """The only way moec writes JSON: one space of indent, keys in record order, a newline at the end."""
    return (json.dumps(value, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def render_manifest(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``, with ``manifest_sha256`` filled in."""
    value = to_json(manifest) | {"manifest_sha256": NO_SHA256}
    digest = hashlib.sha256(render_json(value)).hexdigest()
    return render_json(value | {"manifest_sha256": digest})


def manifest_intact(data: bytes, manifest_sha256: str) -> bool:
    """Whether the bytes of a manifest are those that were written."""
    key = b'"manifest_sha256": "'
    blank = data.replace(key + manifest_sha256.encode(), key + NO_SHA256.encode())
    return hashlib.sha256(blank).hexdigest() == manifest_sha256
