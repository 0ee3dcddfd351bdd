"""What ``moec doctor`` calls missing is what the package's extras would install."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from moec.cli import doctor, packages

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OTHERWISE = {"apache_tvm": "tvm", "apache_tvm_ffi": "tvm_ffi"}
"""Distributions whose package has another name."""


def imported(requirements: list[str]) -> set[str]:
    names = {re.split(r"[><=; \[]", each)[0].replace("-", "_") for each in requirements}
    return {OTHERWISE.get(name, name) for name in names}


def test_every_package_is_one_that_moec_names() -> None:
    extras = {name: imported(needs) for name, needs in PROJECT["optional-dependencies"].items()}
    runtime = imported(PROJECT["dependencies"])
    assert set(packages.RUNTIME_PACKAGES) <= runtime
    assert set(packages.SERVER_PACKAGES) == extras["serve"]
    assert set(packages.COMPILE_PACKAGES) <= extras["compile"] | {"tvm"}
    for extra in ("serve", "compile"):
        assert {packages.extra_of(name) for name in extras[extra]} == {extra}


def test_what_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert doctor._missing(packages.SERVER_PACKAGES) == ["uvicorn"]
