"""A checkpoint in a local folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.artifacts.fingerprint import config_sha256
from moec.compiler.checkpoint.pickle_header import read_pickled_header
from moec.compiler.checkpoint.record import Checkpoint, TensorEntry
from moec.compiler.checkpoint.safetensors_header import read_header
from moec.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """One way in which a folder holds weights."""

    index: str
    """Where the weights are several files: which tensor is in which."""
    single: str
    """Where they are one."""
    suffix: str
    read: Callable[[Path], dict[str, TensorEntry]]
    """The tensors of a file."""


LAYOUTS = (
    Layout("model.safetensors.index.json", "model.safetensors", ".safetensors", read_header),
    Layout("pytorch_model.bin.index.json", "pytorch_model.bin", ".bin", read_pickled_header),
)
"""In the order in which they are preferred where a folder has several."""

NEEDED_PATTERNS = ("config.json", *(layout.index for layout in LAYOUTS))
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

NO_CONFIG = "A checkpoint's folder has a config.json. Of a GGUF model, download the file and name it."

LICENSE_PATTERNS = ("LICENSE*", "LICENCE*", "License*", "NOTICE*", "USE_POLICY*", "COPYING*")

OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack")


def read_folder(path: Path, *, source: str, revision: str | None, hub: bool) -> Checkpoint:
    """Read the checkpoint in ``path``: its config and, of the weights that are there, the headers.

    A folder without any weights is a checkpoint too (enough for ``--modules-only``); its index is empty.

    Raises:
        CheckpointError: no usable config, some but not all shards, or a damaged weight file.
    """
    config = read_json(path / "config.json", NO_CONFIG)
    generation = path / "generation_config.json"
    layout = layout_of(path)
    weight_map = _weight_map(path, layout)
    shards = tuple(sorted(set(weight_map.values()))) if weight_map is not None else _single(path, layout)
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
        index={} if absent else _read_index(path, layout, shards, weight_map),
        tokenizer_files=matching(path, TOKENIZER_PATTERNS),
        license_files=matching(path, LICENSE_PATTERNS),
        hub=hub,
    )


def read_json(path: Path, do: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing or does not hold one; ``do`` ends the message.
    """
    if not path.is_file():
        raise CheckpointError(f"No {path.name} in {path.parent}.", "", do)
    value = parse_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.", "", "Download or copy this file again.")
    return value


def parse_json(path: Path) -> Any:
    """Read any JSON value.

    Raises:
        CheckpointError: the file cannot be read, or is cut off or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Cannot read {path}.", f"{error}.", "Download or copy this file again."
        ) from error


def missing_shards(path: Path, shards: Iterable[str]) -> list[str]:
    """Those of ``shards`` that are not in ``path``."""
    return [shard for shard in shards if not (path / shard).is_file()]


def missing_error(path: Path, absent: list[str]) -> CheckpointError:
    """The error for weight files that are named but not there."""
    names = ", ".join(absent[:10]) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
    what = f"{len(absent)} weight file{'s' if len(absent) > 1 else ''} missing in {path}: {names}."
    index = layout_of(path).index
    why = f"{index} names them." if (path / index).is_file() else ""
    return CheckpointError(what, why, "Download or copy the missing files, then run again.")


def no_weights_error(path: Path) -> CheckpointError:
    """The error for a folder without weights that moec reads; says what is there instead."""
    preferred = LAYOUTS[0]
    others = [file.name for file in matching(path, OTHER_WEIGHTS)]
    if not others:
        return CheckpointError(f"No weights in {path}.", "", f"Put {preferred.single} or its shards there.")
    return CheckpointError(
        f"No {preferred.single} and no {preferred.index} in {path}.",
        f"moec reads weights in transformers' layouts only; found {', '.join(others[:5])}.",
        "Convert the checkpoint: load it in transformers and call save_pretrained().",
    )


def layout_of(path: Path) -> Layout:
    """How ``path`` holds weights; the preferred way where it has none."""
    return next((layout for layout in LAYOUTS if _has(path, layout)), LAYOUTS[0])


def has_layout(path: Path) -> bool:
    """Whether ``path`` holds weights in one of ``LAYOUTS``."""
    return any(_has(path, layout) for layout in LAYOUTS)


def _has(path: Path, layout: Layout) -> bool:
    return any((path / name).is_file() for name in (layout.index, layout.single))


def _weight_map(path: Path, layout: Layout) -> dict[str, str] | None:
    file = path / layout.index
    if not file.is_file():
        return None
    weight_map: dict[str, str] | None = read_json(file, "").get("weight_map")
    valid = isinstance(weight_map, dict) and all(
        _plain_name(shard, layout.suffix) for shard in weight_map.values()
    )
    if not valid or not weight_map:
        raise CheckpointError(
            f"{file} has no usable weight_map.",
            f"It must map every tensor to a {layout.suffix} file beside it.",
            "Download or copy this file again.",
        )
    return weight_map


def _plain_name(shard: Any, suffix: str) -> bool:
    return isinstance(shard, str) and shard.endswith(suffix) and "/" not in shard and "\\" not in shard


def _single(path: Path, layout: Layout) -> tuple[str, ...]:
    return (layout.single,) if (path / layout.single).is_file() else ()


def _read_index(
    path: Path, layout: Layout, shards: tuple[str, ...], weight_map: dict[str, str] | None
) -> dict[str, TensorEntry]:
    headers = {shard: layout.read(path / shard) for shard in shards}
    if weight_map is None:
        return {name: entry for header in headers.values() for name, entry in header.items()}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"Tensor {name} is not in {path / shard}.",
                f"{layout.index} says that it is.",
                "Download or copy the index and this file again.",
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def matching(path: Path, patterns: Iterable[str]) -> tuple[Path, ...]:
    """The files in ``path`` whose names match, sorted."""
    return tuple(sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()}))
