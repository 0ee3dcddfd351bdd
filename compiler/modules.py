"""The part of a bundle that needs no weights: records, constants, modules, tokenizer and license files."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from moec.artifacts.files.records import write_record
from moec.artifacts.paths import CONSTANTS_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from moec.artifacts.files.bundle import Modules
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.partition import PartitionedModel

TOKENIZER_FOLDER = "tokenizer"


def save_modules(parts: PartitionedModel, folder: Path) -> None:
    """Write ``model.json``, ``packing.json`` and the constants that packing needs."""
    from safetensors.torch import save

    write_record(parts.model, folder / "model.json")
    write_record(parts.packing, folder / "packing.json")
    constants = {name: tensor.contiguous() for name, tensor in parts.constants.items()}
    # Not save_file: what it writes only the owner may read, whatever the umask.
    (folder / CONSTANTS_NAME).write_bytes(save(constants))


def save_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the tokenizer's and the license files."""
    (folder / TOKENIZER_FOLDER).mkdir(exist_ok=True)
    _copy(checkpoint.tokenizer_files, folder / TOKENIZER_FOLDER)
    for name, content in checkpoint.made_files.items():
        (folder / TOKENIZER_FOLDER / name).write_bytes(content)
    _copy(checkpoint.license_files, folder)
    if not checkpoint.tokenizer_files and not checkpoint.made_files:
        (folder / TOKENIZER_FOLDER).rmdir()


def copy_modules(modules: Modules, folder: Path) -> None:
    """Copy all files of compiled modules."""
    for name in modules.manifest.files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(modules.path / name, target)


def _copy(files: Iterable[Path], folder: Path) -> None:
    for file in files:
        shutil.copyfile(file, folder / file.name)
