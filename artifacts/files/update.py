"""Change some files of a finished bundle, its schedules and their traces above all; everything else stays as it is."""

from __future__ import annotations

import dataclasses
import os
import shutil
from typing import TYPE_CHECKING

from moec.artifacts.files.records import write_record
from moec.artifacts.files.traces import TRACES_NAME, save_traces
from moec.artifacts.files.writer import BundleWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.schedule import Schedule, ScheduleRecord
    from moec.artifacts.traces import Traces

SCHEDULE_NAME = "schedule.json"


def add_schedule(bundle: Bundle, schedule: Schedule) -> None:
    """Put ``schedule`` into the bundle, in the place of one for the same machine and budgets if there is one.

    Raises as `replace_schedules` does.
    """
    others = [other for other in bundle.schedule.schedules if not same_place(other, schedule)]
    replace_schedules(bundle, dataclasses.replace(bundle.schedule, schedules=(*others, schedule)))


def same_place(one: Schedule, other: Schedule) -> bool:
    """Whether two schedules are for the same machine and budgets."""
    return (one.machine.name, one.budgets) == (other.machine.name, other.budgets)


def replace_schedules(bundle: Bundle, record: ScheduleRecord, traces: Traces | None = None) -> None:
    """Write ``schedule.json`` anew, and where ``traces`` are given those that it was made from.

    The open ``bundle`` keeps its schedule and its views. Raises as `rewrite` does.
    """
    files: dict[str, Callable[[Path], None]] = {SCHEDULE_NAME: lambda path: write_record(record, path)}
    if traces is not None:
        files[TRACES_NAME] = lambda path: save_traces(traces, path)
    rewrite(bundle, files)


def rewrite(bundle: Bundle, files: Mapping[str, Callable[[Path], None]]) -> None:
    """Replace some files of a bundle, or add them.

    A second folder with the other files (links, where the file system has them) and the new ones takes the
    bundle's name, so the bundle is whole at every moment.

    Args:
        bundle: an open one, which goes on as it was.
        files: by path relative to the bundle, what writes the file.

    Raises:
        OutputError: the bundle's folder cannot be written.
    """
    unchanged = {path: file for path, file in bundle.manifest.files.items() if path not in files}
    with BundleWriter(bundle.path.resolve(), force=True) as writer:
        for path in unchanged:
            _link(bundle.path / path, writer.folder / path)
        for path, write in files.items():
            (writer.folder / path).parent.mkdir(parents=True, exist_ok=True)
            write(writer.folder / path)
        writer.commit(bundle.manifest, known=unchanged)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
