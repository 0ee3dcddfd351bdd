"""From what the user names to a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moec.compiler.checkpoint.folder import (
    LAYOUTS,
    LICENSE_PATTERNS,
    NEEDED_PATTERNS,
    WISHED_PATTERNS,
    has_layout,
    missing_error,
    missing_shards,
    no_weights_error,
    read_folder,
)
from moec.compiler.checkpoint.gguf import holds_gguf, is_gguf, read_gguf
from moec.compiler.checkpoint.hub import download, is_hub_id, read_headers
from moec.errors import CheckpointError

if TYPE_CHECKING:
    from moec.compiler.checkpoint.record import Checkpoint


def open_checkpoint(model: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint: a local folder, a GGUF file, or a hub id ``owner/name``.

    No weights are read, and none are downloaded: where they are not on this machine, ``index`` stays empty
    until ``fetch_weights``.

    Args:
        model: folder, file or hub id; what exists wins. A folder is one of GGUF files where it has no other weights.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: no such path, no permission, no usable config, missing shards, a damaged weight file.
        NetworkError: the hub cannot be reached, and its cache does not have the model.
    """
    try:
        return _open(model, revision)
    except PermissionError as error:
        raise CheckpointError(
            f"Cannot read {error.filename or model}.", f"{error.strerror}.", "Check its permissions."
        ) from error


def _open(model: str | Path, revision: str | None) -> Checkpoint:
    path = Path(model)
    if is_gguf(path) or (path.is_dir() and not has_layout(path) and holds_gguf(path)):
        return read_gguf(path, source=str(model))
    if path.is_dir():
        return read_folder(path, source=str(model), revision=None, hub=False)
    if path.exists():
        raise CheckpointError(
            f"{path} is a file.",
            "A checkpoint is a folder, or a GGUF file.",
            f"Did you mean its folder, {path.parent}?",
        )
    if isinstance(model, Path) or not is_hub_id(model):
        raise CheckpointError(
            f"No such path: {model}.",
            "It is not a hub id either: those have the form owner/name.",
            "Name the folder of a checkpoint, or a hub id.",
        )
    try:
        folder = download(model, revision, NEEDED_PATTERNS, (*WISHED_PATTERNS, *LICENSE_PATTERNS))
    except CheckpointError as error:
        raise CheckpointError(f"No such path: {model}. {error.what}", error.why, error.do) from error
    return read_folder(folder, source=model, revision=revision, hub=True)


def fetch_weights(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with every weight file on this machine and its tensors indexed.

    For a local folder nothing is fetched: the weights are there, or it is an error.

    Raises:
        CheckpointError: weights are missing or damaged.
        NetworkError: the hub cannot be reached.
    """
    if checkpoint.index:
        return checkpoint
    path = checkpoint.path
    if checkpoint.hub:
        path = _download_weights(checkpoint)
    absent = missing_shards(path, checkpoint.shards)
    if absent:
        raise missing_error(path, absent)
    fetched = read_folder(path, source=checkpoint.source, revision=checkpoint.revision, hub=checkpoint.hub)
    if not fetched.index:
        raise no_weights_error(path)
    return fetched


def with_table(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with its tensors listed, if only in name, type and shape: a hub is asked for headers.

    Raises:
        CheckpointError: a local folder has no weights, or as `read_headers`.
        NetworkError: the hub cannot be reached.
    """
    if checkpoint.index or not checkpoint.hub:
        return fetch_weights(checkpoint)
    return replace(checkpoint, index=read_headers(checkpoint.source, checkpoint.revision))


def _download_weights(checkpoint: Checkpoint) -> Path:
    """The snapshot with the shards, or without an index with the one file that the hub has."""
    if checkpoint.shards:
        return download(checkpoint.source, checkpoint.revision, checkpoint.shards)
    for layout in LAYOUTS:
        path = download(checkpoint.source, checkpoint.revision, (layout.single,))
        if (path / layout.single).is_file():
            break
    return path
