"""The machine descriptions that travel with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.artifacts.files.records import read_machine

MACHINES = sorted((Path(__file__).parents[2] / "examples/machines").glob("*.json"))


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_example_machines(path: Path) -> None:
    machine = read_machine(path)
    assert machine.name == path.stem
    assert machine.source
    has_gpu = machine.gpu_name is not None
    assert (
        has_gpu
        == (machine.gpu_memory_bytes > 0)
        == (machine.gpu_bandwidth_gb_s > 0)
        == (machine.link_gb_s > 0)
    )


def test_there_are_example_machines() -> None:
    assert {"cpu-2core", "rtx-4060-laptop-8gb", "rtx-4090-24gb"} <= {path.stem for path in MACHINES}
