"""What end-to-end benchmarks need first: a bundle, a model for transformers, the machine's bandwidth."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moec.runtime.devices.measure import read_bandwidth
from moec.runtime.machine.threads import default_threads

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def bundle_of(model: Path, bundle: Path | None) -> Iterator[Path]:
    """``bundle``, or one compiled from the checkpoint ``model`` for this machine's CPU, gone afterwards."""
    if bundle is not None:
        yield bundle
        return
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        output = Path(folder, "model.moec")
        command = [sys.executable, "-m", "moec", "compile", str(model), "-o", str(output)]
        subprocess.run([*command, "--calibration", "none", "--target", "cpu"], check=True)
        yield output


@contextmanager
def transformers_model(model: Path) -> Iterator[Path]:
    """A folder that transformers takes: ``model`` itself, or one with the config that ``model`` is."""
    if model.is_dir():
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(model, Path(folder, "config.json"))
        yield Path(folder)


def copy_rate(device: str) -> float:
    """GB/s that floors are made of: of a copy in a GPU's memory, of reading a host's."""
    if not device.startswith("cuda"):
        return read_bandwidth(default_threads())
    import torch

    from benchmarks.ceilings import copy_bandwidth

    rate = copy_bandwidth(torch.device(device))
    torch.cuda.empty_cache()
    return rate


def product_rate(device: str) -> float:
    """TFLOP/s of torch's bfloat16 products."""
    import torch

    from benchmarks.ceilings import MATRIX, matrix_rate

    place = torch.device(device)
    rate = matrix_rate(place, MATRIX if place.type == "cuda" else MATRIX // 8)
    if place.type == "cuda":
        torch.cuda.empty_cache()
    return rate
