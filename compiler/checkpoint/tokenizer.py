"""Which files are a bundle's tokenizer: the checkpoint's, those made of its metadata, or those of another folder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moec.compiler.checkpoint.folder import TOKENIZER_PATTERNS, matching
from moec.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from moec.compiler.checkpoint.record import Checkpoint


def with_tokenizer(checkpoint: Checkpoint, folder: Path | None) -> Checkpoint:
    """The same checkpoint with its tokenizer's files at hand, or with those of ``folder`` instead.

    Raises:
        CheckpointError: ``folder`` has none.
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
        return replace(checkpoint, tokenizer_files=files, made_files={})
    if checkpoint.make_tokenizer is None:
        return checkpoint
    return replace(checkpoint, made_files=checkpoint.make_tokenizer())
