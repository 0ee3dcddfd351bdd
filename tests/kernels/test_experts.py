from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moec.artifacts.activation import Expression
from moec.artifacts.layout.experts import ExpertPart, layout
from moec.artifacts.model import ExpertBody
from moec.compiler.kernels import reference
from moec.compiler.kernels.cpu.experts import experts
from moec.compiler.kernels.cpu.machine import Machine
from moec.compiler.kernels.cpu.short_codes import steps_of
from moec.formats import dequantize, format_of, pack_rows
from tests.support.formats import random_quantized

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = 3e-6
SHORT_TOLERANCE = 6e-4
"""Where activations and what lies between the products are rounded to 16 bits."""
Compile = Callable[[Any, int], Callable[..., None]]
Parts = list[dict[str, Any]]

SWIGLU: Expression = ("mul", ("silu", "gate"), "up")
CLAMPED: Expression = (
    "mul",
    ("add", ("max", ("min", "up", 1.0), -1.0), 1.0),
    ("mul", ("min", "gate", 1.0), ("sigmoid", ("mul", 1.702, ("min", "gate", 1.0)))),
)


def _pool(
    body: ExpertBody, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, Parts, torch.Tensor]:
    """Memory with ``count`` experts in it, their parts as numpy arrays, and the table of addresses."""
    shape = layout(body)
    memory = torch.full((count * shape.stride_bytes + 64,), 0xFF, dtype=torch.uint8)
    begin = -memory.data_ptr() % 64
    parts: Parts = []
    for expert in range(count):
        parts.append({})
        for part in shape.parts:
            value, parts[-1][part.name] = _part(body, part, generator)
            place = begin + expert * shape.stride_bytes + part.offset_bytes
            memory[place : place + part.size_bytes] = value.view(-1).view(torch.uint8)
    addresses = [memory.data_ptr() + begin + expert * shape.stride_bytes for expert in range(count)]
    return memory, parts, torch.tensor(addresses, dtype=torch.int64)


def _part(
    body: ExpertBody, part: ExpertPart, generator: torch.Generator
) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """A random part as it is stored, and its values."""
    kind = format_of(body.format)
    if kind is None or len(part.shape) == 1:
        value = (torch.randn(part.shape, generator=generator) * 0.3).to(DTYPES[body.dtype])
        return value, value.double().numpy()
    columns = body.intermediate if part.name == "down" else body.hidden
    quantized = random_quantized(
        kind, part.shape[0], columns, int(torch.randint(1 << 30, (), generator=generator))
    )
    return torch.from_numpy(pack_rows(kind, quantized)), dequantize(kind, quantized).astype(np.float64)


CASES = [
    (16, "bfloat16", 37, 70, True, False, SWIGLU),
    (8, "float16", 64, 33, True, True, CLAMPED),
    (4, "float32", 20, 7, False, True, ("gelu", "up")),
    (16, "float32", 130, 100, True, True, CLAMPED),
]


FORMAT_CASES = [
    ("int4-g32", 16),
    pytest.param("int8-g128", 8, marks=pytest.mark.slow),
    pytest.param("int4-g64-z", 8, marks=pytest.mark.slow),
    pytest.param("fp8-e4m3", 16, marks=pytest.mark.slow),
    pytest.param("mxfp4", 4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("lanes", "dtype", "hidden", "intermediate", "gated", "bias", "activation"), CASES)
def test_experts_match_the_reference(
    compiled: Compile,
    lanes: int,
    dtype: str,
    hidden: int,
    intermediate: int,
    gated: bool,
    bias: bool,
    activation: Expression,
) -> None:
    check(
        compiled,
        ExpertBody("b", hidden, intermediate, gated, bias, bias, activation, dtype),  # type: ignore[arg-type]
        lanes,
    )


@pytest.mark.parametrize(("name", "lanes"), FORMAT_CASES)
def test_quantized_experts_match_the_reference(compiled: Compile, name: str, lanes: int) -> None:
    check(compiled, ExpertBody("b", 160, 75, True, True, True, CLAMPED, "bfloat16", name), lanes)


def check(compiled: Compile, body: ExpertBody, lanes: int) -> None:
    """Calls of many shapes."""
    kernel = compiled(experts(body, lanes=lanes), lanes)
    generator = torch.Generator().manual_seed(1)
    for count, tokens, chosen, one_expert in (
        (5, 1, 1, False),
        (9, 7, 4, False),
        (5, 2, 2, False),
        (3, 33, 2, False),
        (6, 150, 2, True),
        (512, 3, 8, False),
    ):
        _memory, parts, table = _pool(body, count, generator)
        x = torch.randn(tokens, body.hidden, generator=generator)
        index = torch.randint(-1, count + 1, (tokens, chosen), generator=generator)
        if one_expert:
            index[:] = 4
        weight = torch.rand(tokens, chosen, generator=generator)
        out = torch.full((tokens, body.hidden), 7.0)
        kernel(x, index, weight, table, out)
        expected = reference.experts(body, parts, x.double().numpy(), index.numpy(), weight.double().numpy())
        error = np.abs(out.double().numpy() - expected).max() / max(1e-9, np.abs(expected).max())
        assert error < tolerance(body, lanes), (count, tokens, chosen)


def tolerance(body: ExpertBody, lanes: int) -> float:
    """Of few tokens an expert."""
    kind = format_of(body.format)
    return TOLERANCE if kind is None or steps_of(kind, Machine(lanes)) is None else SHORT_TOLERANCE


def test_indices_out_of_range_contribute_nothing(compiled: Compile) -> None:
    body = ExpertBody("b", 16, 16, True, False, False, SWIGLU, "float32")
    kernel = compiled(experts(body, lanes=8), 8)
    _memory, _, table = _pool(body, 2, torch.Generator().manual_seed(2))
    x, out = torch.randn(2, 16), torch.full((2, 16), 7.0)
    index = torch.tensor([[2, -1], [1 << 40, -(1 << 62)]])
    kernel(x, index, torch.ones(2, 2), table, out)
    assert (out == 0).all()
