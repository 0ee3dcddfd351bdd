"""Rows of quantized tables, on the CPU and in the emulator of CUDA, are those of the reference bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from moec.compiler.lowering.lower import lower
from moec.compiler.lowering.targets import parse_target
from moec.formats import FORMATS, dequantize_rows, pack_rows
from tests.support.cuda_emulator import Emulated
from tests.support.formats import random_quantized
from tests.support.lowered import lower_segments, run_segment
from tests.support.segments import Graph, Module, aligned, bare_model, trace

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

ROWS, COLUMNS = 37, 150
NAMES = ("int8-g128", "int4-g32", "int4-g64-z", "fp8-e4m3", "mxfp4")
"""Every kind of code, of scale, and of zero point."""


class Lookup(torch.nn.Module):
    """Rows of a table, and what is computed from them: ``(ids [1, T], table [V, row_bytes])``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, ids: Any, table: Any) -> tuple[Any, ...]:
        rows = torch.ops.moec.lookup(table, ids, COLUMNS, self.name)
        return rows, rows + rows


def table(name: str) -> Any:
    quantized = random_quantized(FORMATS[name], ROWS, COLUMNS, seed=7)
    if FORMATS[name].scale == "e8m0":
        quantized.scales[0, :3] = (0, 1, 255)
    if name == "fp8-e4m3":
        quantized.codes[0, :2] = (0x7F, 0xFF)
    return pack_rows(FORMATS[name], quantized)


def lookups(names: Iterable[str]) -> dict[str, Graph]:
    example = torch.zeros(1, 5, dtype=torch.int64)
    return {
        name.replace("-", "_"): trace(Lookup(name), (example, torch.from_numpy(table(name))), 1)
        for name in names
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    segments = lookups(NAMES)
    output = tmp_path_factory.mktemp("module")
    lower(bare_model(segments), segments, parse_target("cpu"), output)
    return output


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*invalid value.*")
def test_rows_are_those_of_the_reference(name: str, compiled: Path) -> None:
    bytes_ = table(name)
    ids = torch.tensor([[0, 5, 36, 0, 17, -3, 99]])
    rows, doubled = Module(compiled)(name.replace("-", "_"), ids, torch.from_numpy(bytes_))
    expected = dequantize_rows(FORMATS[name], bytes_, COLUMNS)[ids[0].clip(0, ROWS - 1).numpy()]
    np.testing.assert_array_equal(rows[0], expected)
    np.testing.assert_array_equal(doubled[0], expected + expected)


def test_a_gpu_looks_up_the_same() -> None:
    segments = lookups(NAMES)
    model = bare_model(segments)
    lowered = lower_segments(segments, model, "cuda-sm_80")
    emulated = Emulated(*(function for _, function in lowered.functions.functions_items()))
    ids = aligned(np.array([[3, 36, -1, 12]]))
    for name, spec in zip(NAMES, model.functions, strict=True):
        segment = lowered.segments[spec.name]
        rows, doubled = run_segment(
            segment,
            lambda function, given: emulated(function, *given),
            [ids],
            [aligned(table(name))],
            spec.outputs,
            4,
        )
        expected = dequantize_rows(FORMATS[name], table(name), COLUMNS)[ids[0].clip(0)]
        np.testing.assert_array_equal(rows[0], expected)
        np.testing.assert_array_equal(doubled[0], expected + expected)
