"""Bundles of tiny models, compiled once a session and model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moec.planning.machines import common_machines
from tests.support.compiling import compile_checkpoint
from tests.support.made_once import made_once
from tests.support.tiny_models import save

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v2"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
BundleMaker = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def example_bundle() -> Path:
    """The shipped, trained example as a bundle, the same for all processes: only to be read."""

    def compile_example(folder: Path) -> None:
        compile_checkpoint(EXAMPLE, folder / "tiny.moec", calibrate=True, machines=common_machines())

    return made_once("example", compile_example) / "tiny.moec"


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> BundleMaker:
    """``make_bundle(name, dtype)`` gives the folders of a tiny checkpoint and of its bundle."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(name: str, dtype: str = "f32") -> tuple[Path, Path]:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{dtype}")
            save(name, folder / "checkpoint", dtype=DTYPES[dtype])
            compile_checkpoint(folder / "checkpoint", folder / "model.moec", dtype=dtype)
            made[name, dtype] = folder / "checkpoint", folder / "model.moec"
        return made[name, dtype]

    return make
