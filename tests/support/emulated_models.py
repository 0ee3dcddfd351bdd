"""Tiny models for the emulated GPU: bundles made once for all processes, what they are asked, what they planned."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import runtime
from moec.compiler.lowering import cuda_module
from moec.compiler.quantization import policy_named
from moec.runtime.memory.device_budget import DevicePlan
from tests.support.compiling import compile_checkpoint
from tests.support.cuda_stub import Stub
from tests.support.cuda_stub.images import write_image
from tests.support.made_once import made_once
from tests.support.tiny_models import save

PROMPTS = ([11, 12, 13, 14, 15, 16, 17], [90, 5, 77], list(range(40, 80)))
NEW = 12
CACHE = 512


def compiled(
    folder: Path,
    dtype: str,
    stored: torch.dtype,
    name: str = "deepseek_v2_lite",
    quantization: str | None = None,
    *,
    rings: bool = False,
) -> Path:
    """A tiny model with code for the CPU, and for the emulator where a GPU's would be; made once for all processes.

    With ``rings`` experts go through rings, as by themselves only large ones do.
    """
    made = made_once(
        f"{name}-{dtype}-{stored}-{quantization}{'-rings' * rings}",
        lambda empty: _compile(empty, dtype, stored, name, quantization, rings),
    )
    shutil.copytree(made / "checkpoint", folder / "checkpoint", dirs_exist_ok=True)
    return shutil.copytree(made / "model.moec", folder / "model.moec")


def _compile(
    folder: Path, dtype: str, stored: torch.dtype, name: str, quantization: str | None, rings: bool
) -> None:
    save(name, folder / "checkpoint", dtype=stored)
    with pytest.MonkeyPatch.context() as patch:
        if rings:
            patch.setattr("moec.compiler.kernels.cuda.experts.rings.in_registers", lambda _: False)
        patch.setattr(cuda_module, "_machine_code", lambda source, target: source)
        patch.setattr(cuda_module, "write_fatbin", write_image)
        compile_checkpoint(
            folder / "checkpoint",
            folder / "model.moec",
            dtype=dtype,
            targets=("cpu", "cuda-sm_90"),
            quantization=None if quantization is None else policy_named(quantization),
        )


def rows(model: runtime.Model, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": [], **options}
    width = max(map(len, prompts))
    return [row[width:].tolist() for row in np.atleast_2d(model.generate(prompts, **options))]


def nothing_left(stub: Stub) -> None:
    """The GPU is empty."""
    gc.collect()
    alive = stub.counts()._replace(launches=0, copies=0)
    assert tuple(alive) == (0,) * len(alive), alive


def planned(model: runtime.Model) -> DevicePlan:
    assert isinstance(model.memory, DevicePlan)
    return model.memory
