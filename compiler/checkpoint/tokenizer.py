"""Which files are a bundle's tokenizer: the checkpoint's, those made of its metadata, or those of another folder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moec.compiler.checkpoint.folder import TOKENIZER_PATTERNS, matching, parse_json
from moec.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from moec.compiler.checkpoint.record import Checkpoint


def with_tokenizer(checkpoint: Checkpoint, folder: Path | None) -> Checkpoint:
    """The same checkpoint with its tokenizer's files at hand, or with those of ``folder`` instead.

    Raises:
        CheckpointError: ``folder`` has none, or a file of them is cut off or damaged.
        UnsupportedModelError: the checkpoint's own cannot be made.
    """
    if folder is not None:
        files = matching(folder, TOKENIZER_PATTERNS)
        if not any(file.name == "tokenizer.json" for file in files):
            raise CheckpointError(
                f"No tokenizer.json in {folder}.",
                "It is what a bundle's tokenizer is read from.",
                "Name the folder of the model's own checkpoint.",
            )
        _check_json(files)
        return replace(checkpoint, tokenizer_files=files, made_files={})
    _check_json(checkpoint.tokenizer_files)
    if checkpoint.make_tokenizer is None:
        return checkpoint
    return replace(checkpoint, made_files=checkpoint.make_tokenizer())


def _check_json(files: Iterable[Path]) -> None:
    """Refuse now what would be found when the finished bundle reads its first prompt."""
    for file in files:
        if file.suffix == ".json":
            parse_json(file)
