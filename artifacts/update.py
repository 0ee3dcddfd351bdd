"""Change the schedule of a finished bundle; everything else in it stays as it is."""

from __future__ import annotations

import dataclasses
import os
import shutil
from typing import TYPE_CHECKING

from moec.artifacts.records import write_record
from moec.artifacts.writer import BundleWriter

if TYPE_CHECKING:
    from pathlib import Path

    from moec.artifacts.reader import Bundle
    from moec.artifacts.schedule import Schedule

SCHEDULE_NAME = "schedule.json"


def add_schedule(bundle: Bundle, schedule: Schedule) -> None:
    """Put ``schedule`` into the bundle, in the place of one for the same machine and budgets if there is one.

    A second folder with the same files (links, where the file system has them) and the new schedule takes the
    bundle's name, so the bundle is whole at every moment. The open ``bundle`` keeps its schedule and its
    views.

    Raises:
        OutputError: the bundle's folder cannot be written.
    """
    others = [
        other
        for other in bundle.schedule.schedules
        if (other.machine.name, other.budgets) != (schedule.machine.name, schedule.budgets)
    ]
    record = dataclasses.replace(bundle.schedule, schedules=(*others, schedule))
    unchanged = {path: file for path, file in bundle.manifest.files.items() if path != SCHEDULE_NAME}
    with BundleWriter(bundle.path.resolve(), force=True) as writer:
        for path in unchanged:
            _link(bundle.path / path, writer.folder / path)
        write_record(record, writer.folder / SCHEDULE_NAME)
        writer.commit(bundle.manifest, known=unchanged)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
