"""What ``moec doctor`` calls missing is what the package's extras would install."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from moec.cli import doctor

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OTHERWISE = {"apache_tvm": "tvm", "apache_tvm_ffi": "tvm_ffi"}
"""Distributions whose package has another name."""


def packages(requirements: list[str]) -> set[str]:
    names = {re.split(r"[><=; \[]", each)[0].replace("-", "_") for each in requirements}
    return {OTHERWISE.get(name, name) for name in names}


def test_every_package_is_one_that_moec_names() -> None:
    extras = {name: packages(needs) for name, needs in PROJECT["optional-dependencies"].items()}
    runtime = packages(PROJECT["dependencies"])
    assert set(doctor.RUNTIME_PACKAGES) <= runtime
    assert set(doctor.SERVER_PACKAGES) == extras["serve"]
    assert set(doctor.COMPILE_PACKAGES) <= extras["compile"] | {"tvm"}


def test_what_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert doctor._missing(doctor.SERVER_PACKAGES) == ["uvicorn"]
