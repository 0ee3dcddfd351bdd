"""Which files a GGUF model is: one, or the numbered parts of one."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from moec.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

SUFFIX = ".gguf"
PROJECTOR = "mmproj"
"""In the names of files with what sees or hears, which lie beside the language model's."""

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def model_files(path: Path) -> tuple[Path, ...]:
    """The files of the model that ``path`` is: a file, any part of one, or a folder with one model.

    Raises:
        CheckpointError: parts are missing, or the folder has several models.
    """
    if not path.is_dir():
        return _whole(path)
    models: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(path.glob(f"*{SUFFIX}")):
        if PROJECTOR not in file.name.lower():
            models[model_name(file)].append(file)
    if len(models) > 1:
        raise CheckpointError(
            f"{path} has several GGUF models: {', '.join(sorted(models))}.",
            "",
            "Name the file of one of them.",
        )
    if not models:
        raise CheckpointError(f"No GGUF file of a language model in {path}.", "", "Name the file.")
    return _whole(next(iter(models.values()))[0])


def model_name(file: Path) -> str:
    """The file's name without suffix and number."""
    part = _PART.fullmatch(file.name)
    return file.stem if part is None else part["stem"]


def _whole(file: Path) -> tuple[Path, ...]:
    part = _PART.fullmatch(file.name)
    if part is None:
        return (file,)
    count = int(part["count"])
    files = [file.with_name(f"{part['stem']}-{n:05d}-of-{count:05d}{SUFFIX}") for n in range(1, count + 1)]
    absent = [one.name for one in files if not one.is_file()]
    if absent:
        raise CheckpointError(
            f"{len(absent)} of {count} parts of {part['stem']} missing in {file.parent}: "
            f"{', '.join(absent[:10])}.",
            "",
            "Download or copy the missing files, then run again.",
        )
    return tuple(files)
