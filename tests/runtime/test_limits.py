"""What the process may use, read from made-up files of the system."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from moec.runtime.machine import limits

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 64 MiB, 48 of them available; the process is in the cgroup ``a/b``."""
    (tmp_path / "meminfo").write_text("MemTotal: 65536 kB\nMemAvailable: 49152 kB\n")
    (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/a/b\n")
    (tmp_path / "cgroup/a/b").mkdir(parents=True)
    for name, place in (("_CGROUPS", "cgroup"), ("_OWN", "own"), ("_MEMINFO", "meminfo")):
        monkeypatch.setattr(limits, name, tmp_path / place)
    return tmp_path / "cgroup"


def limit(folder: Path, most: int, used: int, files: tuple[int, int] = (0, 0)) -> None:
    """A cgroup's limit, what it uses, and how much of that are files, in MiB."""
    (folder / "memory.max").write_text(f"{most * MIB}\n")
    (folder / "memory.current").write_text(f"{used * MIB}\n")
    stat = {"anon": used - sum(files), "active_file": files[0], "inactive_file": files[1]}
    (folder / "memory.stat").write_text("".join(f"{name} {size * MIB}\n" for name, size in stat.items()))


def test_a_machine_without_limits(system: Path) -> None:
    (system / "a/b/memory.max").write_text("max\n")
    assert (limits.total_memory(), limits.available_memory()) == (64 * MIB, 48 * MIB)
    assert limits.cpu_quota() is None


@pytest.mark.parametrize("place", ["", "a", "a/b"])
def test_the_limit_of_every_cgroup_around_the_process_counts(system: Path, place: str) -> None:
    limit(system / place, 20, 12)
    (system / place / "cpu.max").write_text("250000 100000\n")
    assert (limits.total_memory(), limits.available_memory()) == (20 * MIB, 8 * MIB)
    assert limits.cpu_quota() == 3


def test_the_least_of_several_limits(system: Path) -> None:
    limit(system / "a", 30, 25)
    limit(system / "a/b", 20, 5)
    assert (limits.total_memory(), limits.available_memory()) == (20 * MIB, 5 * MIB)


def test_files_that_were_read_leave_when_memory_is_wanted(system: Path) -> None:
    limit(system / "a/b", 20, 19, files=(4, 11))
    assert limits.available_memory() == 16 * MIB


def test_a_cgroup_that_uses_more_than_it_may_has_nothing_left(system: Path) -> None:
    limit(system / "a/b", 20, 21)
    assert limits.available_memory() == 0


def test_a_process_outside_of_the_hierarchy_that_it_sees(system: Path) -> None:
    (system.parent / "own").write_text("0::/../other\n")
    limit(system, 20, 12)
    assert limits.available_memory() == 8 * MIB
