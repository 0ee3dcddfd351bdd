"""Bundles that somebody has edited, and what reading them says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from moec.artifacts.files.manifest import FileRecord, Manifest, render_manifest
from moec.artifacts.files.reader import open_bundle, read_manifest
from moec.artifacts.files.verify import sha256_file
from moec.errors import BundleError


def reseal(folder: Path, **changes: Any) -> None:
    """Make the manifest fit the files again, as somebody would who edits a bundle on purpose."""
    manifest = Manifest(**vars(read_manifest(folder)))
    files = {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    changed = dataclasses.replace(manifest, files=files | changes.pop("files", {}), **changes)
    (folder / "manifest.json").write_bytes(render_manifest(changed))


def edit_json(path: Path, edit: Any) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    reseal(next(folder for folder in path.parents if (folder / "manifest.json").exists()))


def refuses(folder: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert caught.value.what
    assert caught.value.why
    assert caught.value.do
    for word in words:
        assert word in str(caught.value)
