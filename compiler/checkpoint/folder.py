"""A checkpoint in a local folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from moec.artifacts.fingerprint import config_sha256
from moec.compiler.checkpoint.record import Checkpoint, TensorEntry
from moec.compiler.checkpoint.safetensors_header import read_header
from moec.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

NEEDED_PATTERNS = ("config.json", INDEX_FILE)
"""What ``open_checkpoint`` fetches from a hub; none of it is a weight."""

TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
)

WISHED_PATTERNS = ("generation_config.json", *TOKENIZER_PATTERNS)
"""What it fetches besides, where the hub has it."""

LICENSE_PATTERNS = ("LICENSE*", "LICENCE*", "License*", "NOTICE*", "USE_POLICY*", "COPYING*")

OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")


def read_folder(path: Path, *, source: str, revision: str | None, hub: bool) -> Checkpoint:
    """Read the checkpoint in ``path``: its config and, of the weights that are there, the headers.

    A folder without any weights is a checkpoint too (enough for ``--modules-only``); its index is empty.

    Raises:
        CheckpointError: no usable config, some but not all shards, or a damaged weight file.
    """
    config = read_json(path / "config.json", "A checkpoint folder in transformers' layout has a config.json.")
    generation = path / "generation_config.json"
    weight_map = _weight_map(path)
    shards = tuple(sorted(set(weight_map.values()))) if weight_map is not None else _single(path)
    absent = missing_shards(path, shards)
    if absent and not hub and len(absent) < len(shards):
        raise missing_error(path, absent)
    return Checkpoint(
        source=source,
        revision=revision,
        path=path,
        config=config,
        config_sha256=config_sha256(config),
        generation_config=read_json(generation, "") if generation.is_file() else None,
        shards=shards,
        index={} if absent else _read_index(path, shards, weight_map),
        tokenizer_files=_matching(path, TOKENIZER_PATTERNS),
        license_files=_matching(path, LICENSE_PATTERNS),
        hub=hub,
    )


def read_json(path: Path, do: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing or does not hold one; ``do`` ends the message.
    """
    if not path.is_file():
        raise CheckpointError(f"No {path.name} in {path.parent}.", "", do)
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Cannot read {path}.", str(error), "Download or copy this file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.", "", "Download or copy this file again.")
    return value


def missing_shards(path: Path, shards: Iterable[str]) -> list[str]:
    """Those of ``shards`` that are not in ``path``."""
    return [shard for shard in shards if not (path / shard).is_file()]


def missing_error(path: Path, absent: list[str]) -> CheckpointError:
    """The error for weight files that are named but not there."""
    names = ", ".join(absent[:10]) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
    what = f"{len(absent)} weight file{'s' if len(absent) > 1 else ''} missing in {path}: {names}."
    why = f"{INDEX_FILE} names them." if (path / INDEX_FILE).is_file() else ""
    return CheckpointError(what, why, "Download or copy the missing files, then run again.")


def no_weights_error(path: Path) -> CheckpointError:
    """The error for a folder without weights that moec reads; says what is there instead."""
    others = [file.name for file in _matching(path, OTHER_WEIGHTS)]
    if not others:
        return CheckpointError(f"No weights in {path}.", "", f"Put {SINGLE_FILE} or its shards there.")
    return CheckpointError(
        f"No {SINGLE_FILE} and no {INDEX_FILE} in {path}.",
        f"moec reads safetensors in transformers' layout only; found {', '.join(others[:5])}.",
        "Convert the checkpoint: load it in transformers and call save_pretrained().",
    )


def _weight_map(path: Path) -> dict[str, str] | None:
    file = path / INDEX_FILE
    if not file.is_file():
        return None
    weight_map: dict[str, str] | None = read_json(file, "").get("weight_map")
    valid = isinstance(weight_map, dict) and all(_plain_name(shard) for shard in weight_map.values())
    if not valid or not weight_map:
        raise CheckpointError(
            f"{file} has no usable weight_map.",
            "It must map every tensor to a safetensors file beside it.",
            "Download or copy this file again.",
        )
    return weight_map


def _plain_name(shard: Any) -> bool:
    return (
        isinstance(shard, str) and shard.endswith(".safetensors") and "/" not in shard and "\\" not in shard
    )


def _single(path: Path) -> tuple[str, ...]:
    return (SINGLE_FILE,) if (path / SINGLE_FILE).is_file() else ()


def _read_index(
    path: Path, shards: tuple[str, ...], weight_map: dict[str, str] | None
) -> dict[str, TensorEntry]:
    headers = {shard: read_header(path / shard) for shard in shards}
    if weight_map is None:
        return {name: entry for header in headers.values() for name, entry in header.items()}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"Tensor {name} is not in {path / shard}.",
                f"{INDEX_FILE} says that it is.",
                "Download or copy the index and this file again.",
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _matching(path: Path, patterns: Iterable[str]) -> tuple[Path, ...]:
    return tuple(sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()}))
