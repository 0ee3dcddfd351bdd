"""Whether the parts of ``manifest.json`` belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.files.checks.names import twice
from moec.artifacts.paths import PROGRAM_NAME, program_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.artifacts.files.manifest import Manifest


def manifest_problems(manifest: Manifest) -> Iterator[str]:
    """What in ``manifest.json`` does not belong together."""
    yield from twice("target", [target.name for target in manifest.targets])
    if not manifest.targets:
        yield "there is no target"
    named: list[str] = [path for target in manifest.targets for path in target.files]
    named += manifest.tokenizer.files if manifest.tokenizer else ()
    for path in named:
        if path not in manifest.files:
            yield f"{path} is named but not in the file table"
    for target in manifest.targets:
        if not target.files:
            yield f"target {target.name} has no files"
        elif program_name(target.name) not in target.files:
            yield f"target {target.name} has no {PROGRAM_NAME}"
