"""The machine descriptions that travel with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moec.artifacts.files.records import read_machine
from moec.errors import BundleError

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


@pytest.mark.parametrize(
    ("example", "change", "why"),
    [
        ("rtx-4090-24gb", {"link_gb_s": 0}, "link_gb_s is 0, and it has the GPU"),
        ("rtx-4090-24gb", {"gpu_bandwidth_gb_s": 0}, "gpu_bandwidth_gb_s is 0"),
        ("rtx-4090-24gb", {"gpu_memory_bytes": 0}, "gpu_memory_bytes is 0"),
        ("rtx-4090-24gb", {"gpu_name": None}, "gpu_name says that it has no GPU"),
        ("cpu-2core", {"link_gb_s": 12.5}, "link_gb_s is 12.5"),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(
    tmp_path: Path, example: str, change: dict[str, object], why: str
) -> None:
    (source,) = (path for path in MACHINES if path.stem == example)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(json.loads(source.read_text()) | change))
    with pytest.raises(BundleError, match=why):
        read_machine(path)
