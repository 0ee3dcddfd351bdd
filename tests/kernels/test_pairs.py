"""Products of many tokens with bfloat16 in pairs: all numbers of tokens, rows and columns; what one token's depend on.

The kernels run with the instruction's arithmetic written out, on any processor; one test has the instruction itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.artifacts.model import ExpertBody
from moec.compiler.kernels import reference
from moec.compiler.kernels.cpu.experts import experts
from moec.compiler.kernels.cpu.linear import linear
from moec.compiler.kernels.cpu.pair_products import AVX512_BF16
from moec.compiler.kernels.cpu.pairs.tokens import EXACT_ROWS
from moec.compiler.kernels.cpu.tiling import STREAM_COLUMNS
from moec.compiler.lowering.tvm_targets import LLVM_FEATURES
from tests.kernels.test_experts import CLAMPED, SWIGLU, _pool
from tests.support.machine_code import machine_code
from tests.support.plain_pairs import PLAIN, to_bfloat16

Guard = Callable[[torch.Tensor], torch.Tensor]
Kernel = Callable[..., None]
TOLERANCE = 2e-6
MIDDLE_TOLERANCE = 2e-3
"""Of experts: what lies between their products is rounded too, now and then to the other side."""
SHAPES = [
    # Columns that fill no vector; rows that fill no block, and no strip.
    (EXACT_ROWS + 23, 70, None, True),
    pytest.param(EXACT_ROWS + 1, 32, 2, True, marks=pytest.mark.slow),
    # Several spans, of which the last is shorter, or none is.
    pytest.param(EXACT_ROWS + 48, 5030, None, False, marks=pytest.mark.slow),
    pytest.param(EXACT_ROWS + 2, 4096, None, True, marks=pytest.mark.slow),
    pytest.param(EXACT_ROWS + 5, 20, None, False, marks=pytest.mark.slow),
]


def plain(function: Any) -> Kernel:
    """The kernel for the least that any processor has."""
    kernel: Kernel = machine_code(function)[str(function.attrs["global_symbol"])]
    return kernel


def product(rows: int, columns: int, batch: int | None = None, *, bias: bool = False) -> Any:
    """With the instruction's arithmetic written out."""
    return linear(rows=rows, columns=columns, dtype="bfloat16", batch=batch, bias=bias, lanes=16, pairs=PLAIN)


@pytest.mark.parametrize(("rows", "columns", "batch", "biased"), SHAPES)
def test_products_match_the_reference(
    guarded: Guard, rows: int, columns: int, batch: int | None, biased: bool
) -> None:
    """Few tokens meet weights as they are, many are rounded to bfloat16."""
    lead = () if batch is None else (batch,)
    kernel = plain(product(rows, columns, batch, bias=biased))
    weight = guarded(torch.randn(*lead, rows, columns).bfloat16())
    for tokens in (1, STREAM_COLUMNS, 7, 8, 9, 10, 33, 150):
        x = torch.randn(*lead, tokens, columns)
        x[..., 0, :] *= 1e20
        x = guarded(x)
        bias = guarded(torch.randn(*lead, rows))
        out = guarded(torch.full((*lead, tokens, rows), 7.0))
        kernel(x, weight, *([bias] if biased else []), out)
        seen = to_bfloat16(x) if tokens > STREAM_COLUMNS else x.double().numpy()
        expected = reference.linear(seen, weight.double().numpy(), bias.double().numpy() if biased else None)
        largest = np.abs(expected).max(-1, keepdims=True)
        assert (np.abs(out.double().numpy() - expected) / largest).max() < TOLERANCE, tokens


def test_a_token_of_many_is_multiplied_by_itself() -> None:
    """Whatever is beside it, and wherever it lies: infinity, NaN, numbers that bfloat16 rounds to infinity."""
    rows, columns, most = EXACT_ROWS + 3, 96, 70
    kernel = plain(product(rows, columns))
    weight = torch.randn(rows, columns).bfloat16()
    x = torch.randn(most, columns)
    x[1:4] *= torch.tensor([1e30, 1e-28, 0.0])[:, None]
    x[5, 40], x[6, 7], x[7, 9] = torch.inf, torch.nan, torch.finfo(torch.float32).max

    def results(vectors: torch.Tensor) -> torch.Tensor:
        out = torch.full((len(vectors), rows), 7.0)
        kernel(vectors.contiguous(), weight, out)
        return out

    everything = results(x)
    assert everything[6].isnan().all()
    assert not everything[[5, 7]].isfinite().any()
    assert everything[[0, 1, 2, 3, 4]].isfinite().all()
    assert (everything[3] == 0).all()
    for tokens in (STREAM_COLUMNS + 1, 12, 24, 33):
        order = torch.randperm(most)[:tokens]
        np.testing.assert_array_equal(results(x[order]).numpy(), everything[order].numpy())


def test_what_may_be_a_router_stays_exact() -> None:
    """A weight of few rows meets many tokens in float32."""
    kernel = plain(product(EXACT_ROWS, 40))
    weight, x, out = torch.randn(EXACT_ROWS, 40).bfloat16(), torch.randn(20, 40), torch.zeros(20, EXACT_ROWS)
    kernel(x, weight, out)
    expected = reference.linear(x.double().numpy(), weight.double().numpy())
    assert np.abs(out.double().numpy() - expected).max() / np.abs(expected).max() < TOLERANCE


EXPERTS = [
    ExpertBody("b", 70, 53, True, True, True, CLAMPED, "bfloat16"),
    pytest.param(
        ExpertBody("b", 33, 100, False, False, True, ("gelu", "up"), "bfloat16"), marks=pytest.mark.slow
    ),
    pytest.param(ExpertBody("b", 4100, 64, True, False, False, SWIGLU, "bfloat16"), marks=pytest.mark.slow),
]


@cache
def expert_kernel(body: ExpertBody) -> Kernel:
    """With the instruction's arithmetic written out."""
    return plain(experts(body, lanes=16, pairs=PLAIN))


@pytest.mark.parametrize("body", EXPERTS)
def test_experts_match_the_reference(body: ExpertBody) -> None:
    """In a step of many tokens all experts' products are rounded, those of experts with one token too."""
    kernel = expert_kernel(body)
    generator = torch.Generator().manual_seed(1)
    for count, tokens, chosen, one_expert in (
        (5, 1, 1, False),
        (9, 6, 4, False),
        (9, 7, 4, False),
        (3, 33, 2, False),
        (6, 150, 2, True),
    ):
        _memory, parts, table = _pool(body, count, generator)
        x = torch.randn(tokens, body.hidden, generator=generator)
        index = torch.randint(-1, count + 1, (tokens, chosen), generator=generator)
        if one_expert:
            index[:] = 4
        weight = torch.rand(tokens, chosen, generator=generator)
        out = torch.full((tokens, body.hidden), 7.0)
        kernel(x, index, weight, table, out)
        many = tokens > STREAM_COLUMNS
        seen = to_bfloat16(x) if many else x.double().numpy()
        expected = reference.experts(
            body,
            parts,
            seen,
            index.numpy(),
            weight.double().numpy(),
            *([lambda middle: to_bfloat16(torch.from_numpy(middle))] if many else []),
        )
        error = np.abs(out.double().numpy() - expected).max() / max(1e-9, np.abs(expected).max())
        assert error < (MIDDLE_TOLERANCE if many else 3e-6), (count, tokens, chosen)


def test_an_experts_token_does_not_depend_on_what_others_choose() -> None:
    body = EXPERTS[0]
    assert isinstance(body, ExpertBody)
    kernel = expert_kernel(body)
    _memory, _, table = _pool(body, 4, torch.Generator().manual_seed(2))
    x, weight = torch.randn(40, body.hidden), torch.rand(40, 2)
    index = torch.randint(0, 4, (40, 2))

    def results(tokens: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(tokens), body.hidden)
        kernel(x[tokens], index[tokens], weight[tokens], table, out)
        return out

    everything = results(torch.arange(40))
    for tokens in (torch.arange(7), torch.arange(39, 28, -1), torch.randperm(40)[:19]):
        np.testing.assert_array_equal(results(tokens).numpy(), everything[tokens].numpy())


def test_the_instruction_does_what_its_arithmetic_says() -> None:
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this processor has no AVX512-BF16")
    rows, columns = EXACT_ROWS + 3, 352
    mcpu, features = LLVM_FEATURES["x86-64-v4-bf16"]
    function = linear(
        rows=rows, columns=columns, dtype="bfloat16", batch=None, bias=False, lanes=16, pairs=AVX512_BF16
    )
    library = machine_code(function, mcpu=mcpu, mattr=list(features))
    assert "vdpbf16ps" in library.inspect_source("asm")
    kernels = plain(product(rows, columns)), library["linear"]
    weight, x = torch.randn(rows, columns).bfloat16(), torch.randn(30, columns)
    x[3] *= 1e-44  # subnormal numbers are zeros to it
    results = [torch.full((30, rows), 7.0) for _ in kernels]
    for kernel, out in zip(kernels, results, strict=True):
        kernel(x, weight, out)
    written, added = results
    assert (added[3] == 0).all()
    written[3] = 0
    assert ((written - added).abs().amax(1) <= 1e-6 * written.abs().amax(1)).all()
