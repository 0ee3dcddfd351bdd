"""Packages are locked: constraints.txt has a version of all that pyproject.toml asks for, and of what that needs."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[1]
REMEDY = "run `make lock`, and see docs/packages.md"


def asked() -> list[Requirement]:
    """All that pyproject.toml names, but for moec itself."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lists = [
        settings["project"]["dependencies"],
        *settings["project"]["optional-dependencies"].values(),
        *settings["dependency-groups"].values(),
        settings["build-system"]["requires"],
    ]
    return [found for each in lists for text in each if (found := Requirement(text)).name != "moec"]


def constraints() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def locked() -> dict[str, Version]:
    """Versions by name."""
    return {
        each.name: Version(next(iter(each.specifier)).version)
        for each in constraints()
        if each.marker is None or each.marker.evaluate()
    }


def problems(wanted: Iterable[Requirement], versions: dict[str, Version]) -> list[str]:
    return [
        f"{each} is locked to {versions.get(canonicalize_name(each.name))}"
        for each in wanted
        if (version := versions.get(canonicalize_name(each.name))) is None
        or not each.specifier.contains(version, prereleases=True)
    ]


def needs(each: Requirement) -> list[Requirement]:
    """What an installed package asks for, with the extras that ``each`` names."""
    environments = [{"extra": extra} for extra in ("", *each.extras)]
    found = (Requirement(text) for text in metadata.requires(each.name) or ())
    return [need for need in found if need.marker is None or any(map(need.marker.evaluate, environments))]


def test_each_is_one_version_and_no_address() -> None:
    for each in constraints():
        assert each.url is None
        assert [(part.operator, "*" in part.version) for part in each.specifier] == [("==", False)], each
        assert each.name == canonicalize_name(each.name)


def test_what_pyproject_asks_for_is_locked() -> None:
    assert problems(asked(), locked()) == [], REMEDY


def test_what_these_packages_need_is_locked() -> None:
    """As far as the versions that are installed here are the locked ones: others may need other packages."""
    versions = locked()
    seen, left = set(), [each for each in asked() if each.marker is None or each.marker.evaluate()]
    while left:
        each = left.pop()
        name = canonicalize_name(each.name)
        if (name, frozenset(each.extras)) in seen:
            continue
        seen.add((name, frozenset(each.extras)))
        try:
            installed = Version(metadata.version(name)).public
        except metadata.PackageNotFoundError:
            continue
        if installed == str(versions.get(name)):
            wanted = needs(each)
            assert problems(wanted, versions) == [], f"{name} {installed}: {REMEDY}"
            left += wanted


def test_what_is_not_locked_or_out_of_range_is_found() -> None:
    versions = {"click": Version("8.1"), "torch": Version("2.13.0")}
    wanted = map(Requirement, ("Click>=8.1", "torch==2.12.0", "new_one"))
    assert problems(wanted, versions) == ["torch==2.12.0 is locked to 2.13.0", "new_one is locked to None"]
