"""Open a bundle: verify it and read its records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.artifacts.files import checks
from moec.artifacts.files.bundle import Bundle, Modules
from moec.artifacts.files.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, manifest_intact
from moec.artifacts.files.records import decode, parse_json, read_record
from moec.artifacts.files.safetensors import read_table
from moec.artifacts.files.stamps import FileState, Stamp, file_states, read_stamp, write_stamp
from moec.artifacts.files.verify import Level, check, damaged
from moec.artifacts.model import ModelRecord
from moec.artifacts.packing import PackingRecord
from moec.artifacts.paths import DENSE_NAME, WEIGHTS_FOLDER, experts_name, is_safe, program_name
from moec.artifacts.program import ProgramRecord
from moec.artifacts.schedule import ScheduleRecord
from moec.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from moec.artifacts.files.manifest import Contents


@dataclass(frozen=True)
class FoundBundle:
    """A bundle of which the manifest was read."""

    path: Path
    manifest: Manifest
    verify: Level
    states: Mapping[str, FileState]
    """Of its weight files, before anything of them was read."""
    unhashed: frozenset[str]
    """Weight files that ``verify`` wants hashed."""
    checked: bool
    """Whether its JSON files were held against their schemas before."""


def find_bundle(path: str | Path, verify: Level = "full") -> FoundBundle:
    """Read a bundle's manifest, and what is known of its files; `read_bundle` is what comes next.

    Args:
        path: the bundle's folder.
        verify: how much is hashed, see `moec.artifacts.files.verify.Level`.

    Raises:
        BundleError: it is not there or no bundle, its manifest is damaged, or it is of a newer format.
    """
    folder = Path(path).absolute()
    known = Stamp() if verify == "full" else read_stamp(folder, _claimed_sha256(folder))
    manifest = _manifest_of(folder, "bundle", known.records_checked)
    states = file_states(folder, weight_names(manifest))
    unhashed = frozenset(states) - known.unchanged(states) if verify != "sizes" else frozenset()
    return FoundBundle(folder, manifest, verify, states, unhashed, known.records_checked)


def read_bundle(
    found: FoundBundle,
    progress: Callable[[int], None] | None = None,
    *,
    weights_later: bool = False,
) -> Bundle:
    """Verify a bundle and read its records.

    Args:
        found: the bundle.
        progress: told the bytes of each piece hashed, from several threads.
        weights_later: the caller hashes the files of ``found.unhashed`` while it reads them, and then calls `stamp`.

    Raises:
        BundleError: it is damaged, incomplete or inconsistent.
    """
    weights = weight_names(found.manifest)
    unread = set(weights) if weights_later else set(weights) - found.unhashed
    check(found.path, found.manifest, found.verify, progress, unread)
    bundle = _read_records(found.path, found.manifest, found.checked)
    if not weights_later and (found.unhashed or not found.checked):
        stamp(found, found.unhashed)
    return bundle


def stamp(found: FoundBundle, hashed: Collection[str]) -> None:
    """Note what of a bundle was found right, for a later ``verify="once"``.

    Args:
        found: the bundle; what was known of its files stays known.
        hashed: weight files that were hashed now.
    """
    known = () if found.verify == "sizes" else found.states.keys() - found.unhashed
    write_stamp(found.path, found.manifest.manifest_sha256, found.states, {*known, *hashed})


def weight_names(manifest: Manifest) -> list[str]:
    """The files with weights, relative to the bundle."""
    return [name for name in manifest.files if name.startswith(f"{WEIGHTS_FOLDER}/")]


def open_bundle(
    path: str | Path,
    *,
    verify: Level = "full",
    progress: Callable[[int], None] | None = None,
) -> Bundle:
    """`find_bundle` and `read_bundle`."""
    return read_bundle(find_bundle(path, verify), progress)


def open_modules(path: str | Path, *, verify: Level = "full") -> Modules:
    """Open what ``moec compile --modules-only`` made; raises as ``open_bundle`` does."""
    folder = Path(path).absolute()
    manifest = _manifest_of(folder, "modules")
    check(folder, manifest, verify)
    model, packing = _read_model(folder), _read_packing(folder)
    return Modules(folder, manifest, model, packing, _read_programs(folder, manifest, model))


def read_manifest(folder: Path, *, checked: bool = False) -> Manifest:
    """Read and check ``manifest.json`` alone; ``checked``: the same bytes were held against the schema before.

    Raises:
        BundleError: ``folder`` is not a bundle, or its manifest is damaged or of a newer format.
    """
    data = _manifest_bytes(folder)
    value = parse_json(data, str(folder / MANIFEST_NAME))
    _check_version(folder, value)
    manifest = decode(Manifest, "manifest", value, str(folder / MANIFEST_NAME), checked=checked)
    if not manifest_intact(data, manifest.manifest_sha256):
        raise damaged(folder, f"Its {MANIFEST_NAME} was changed: the SHA-256 in it is another.")
    for name in manifest.files:
        if not is_safe(name) or name == MANIFEST_NAME:
            raise damaged(
                folder, f"Its {MANIFEST_NAME} names the path {name!r}, which is not inside the bundle."
            )
    _raise_first(folder, MANIFEST_NAME, checks.manifest_problems(manifest))
    return manifest


def _manifest_bytes(folder: Path) -> bytes:
    do = "Give the folder that `moec compile MODEL -o FOLDER` made."
    if not folder.exists():
        raise BundleError(f"There is no bundle at {folder}.", "No such path.", do)
    if not (folder / MANIFEST_NAME).is_file() or (folder / MANIFEST_NAME).is_symlink():
        raise BundleError(f"{folder} is not a bundle.", f"It has no {MANIFEST_NAME}.", do)
    try:
        return (folder / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{folder} cannot be read.", f"{error.strerror}.", "Check the permissions."
        ) from error


def _check_version(folder: Path, value: Any) -> None:
    version = value.get("format_version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleError(
            f"{folder} is of bundle format {version}.",
            f"This moec reads formats up to {FORMAT_VERSION}.",
            "Install a newer moec, or compile the model again with this one.",
        )


def _claimed_sha256(folder: Path) -> str:
    """The hash that a manifest says it has; `read_manifest` finds out whether it does."""
    try:
        return str(json.loads((folder / MANIFEST_NAME).read_bytes())["manifest_sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _manifest_of(folder: Path, contents: Contents, checked: bool = False) -> Manifest:
    """The manifest of a bundle with these contents."""
    manifest = read_manifest(folder, checked=checked)
    if manifest.contents != contents:
        what, do = {
            "bundle": ("has modules but no weights", "Run `moec pack MODEL MODULES -o BUNDLE` first."),
            "modules": ("is a whole bundle", "Give the folder that `moec compile --modules-only` made."),
        }[contents]
        raise BundleError(f"{folder} {what}.", "It cannot be used here.", do)
    return manifest


def _read_records(folder: Path, manifest: Manifest, checked: bool) -> Bundle:
    """The records of a bundle; ``checked``: the same bytes were held against their schemas before."""
    model = _read_model(folder, checked)
    if not checked:
        _read_packing(folder)
    for name in ("schedule.json", DENSE_NAME, *(experts_name(layer.layer) for layer in model.experts)):
        if name not in manifest.files:
            raise damaged(folder, f"It has no {name}.")
    schedule = read_record(ScheduleRecord, "schedule", folder / "schedule.json", checked=checked)
    dense = read_table(folder / DENSE_NAME)
    sizes = {name: record.size_bytes for name, record in manifest.files.items()}
    _raise_first(folder, "schedule.json", checks.schedule_problems(model, schedule))
    _raise_first(folder, "model.json", checks.dense_problems(model, dense))
    _raise_first(folder, "model.json", checks.experts_problems(model, sizes))
    programs = _read_programs(folder, manifest, model, checked)
    return Bundle(folder, manifest, model, programs, schedule, dense)


def _read_model(folder: Path, checked: bool = False) -> ModelRecord:
    model = read_record(ModelRecord, "model", folder / "model.json", checked=checked)
    _raise_first(folder, "model.json", checks.model_problems(model))
    return model


def _read_packing(folder: Path) -> PackingRecord:
    return read_record(PackingRecord, "packing", folder / "packing.json")


def _read_programs(
    folder: Path, manifest: Manifest, model: ModelRecord, checked: bool = False
) -> dict[str, ProgramRecord]:
    programs: dict[str, ProgramRecord] = {}
    for target in manifest.targets:
        name = program_name(target.name)
        programs[target.name] = read_record(ProgramRecord, "program", folder / name, checked=checked)
        _raise_first(folder, name, checks.program_problems(model, programs[target.name]))
    return programs


def _raise_first(folder: Path, name: str, problems: Iterator[str]) -> None:
    for problem in problems:
        raise damaged(folder, f"Its {name} is inconsistent: {problem}.")
