"""The experts of many tokens on tensor cores, in the emulator.

The kernel rounds x and what lies between the two products to the weights' type, and results to float16 until they are
summed: so does the reference here, and then a float32 sum beside a float64 one can still tip a rounding the other way,
by one part in 256 (bfloat16) or 2048 (float16) of one of many terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moec.artifacts.activation import ARITY, Expression
from moec.artifacts.layout.experts import layout
from moec.artifacts.model import ExpertBody
from moec.compiler.kernels import reference
from moec.compiler.kernels.cuda.experts.call import ExpertCall
from moec.compiler.kernels.cuda.experts.layout import slice_columns, workspace_bytes
from moec.compiler.kernels.cuda.experts.many import (
    HOPPER_PACKED_TILES,
    HOPPER_TILES,
    TILES,
    Tiles,
    emit_experts_many,
)
from moec.compiler.kernels.cuda.many import pipeline
from moec.compiler.kernels.cuda.many.warpgroup_sums import WarpgroupTile
from moec.compiler.kernels.emit import Argument, arguments, build, symbol
from moec.runtime.tensors import aligned_empty
from tests.support.arrays import DTYPES, aligned, plain, relative_error
from tests.support.cuda_emulator import Emulated

TOLERANCE = {"bfloat16": 2e-3, "float16": 6e-4}
SWIGLU: Expression = ("mul", ("silu", "gate"), "up")
CLAMPED: Expression = (
    "mul",
    ("add", ("max", ("min", "up", 1.0), -1.0), 1.0),
    ("mul", ("min", "gate", 1.0), ("sigmoid", ("mul", 1.702, ("min", "gate", 1.0)))),
)


def body_of(
    hidden: int,
    intermediate: int,
    dtype: str,
    activation: Expression = SWIGLU,
    *,
    gated: bool = True,
    bias: bool = False,
) -> ExpertBody:
    return ExpertBody("b", hidden, intermediate, gated, bias, bias, activation, dtype)  # type: ignore[arg-type]


@cache
def kernel_of(body: ExpertBody, top_k: int, tiles: Tiles) -> Emulated:
    def emit() -> None:
        t, k, e, size = symbol("T"), symbol("K"), symbol("E"), symbol("B")
        x, index, weight, table, workspace, out = arguments(
            Argument("x", (t, body.hidden), "float32"),
            Argument("index", (t, k), "int64"),
            Argument("weight", (t, k), "float32"),
            Argument("table", (e,), "int64"),
            Argument("workspace", (size,), "uint8"),
            Argument("out", (t, body.hidden), "float32"),
        )
        call = ExpertCall(x, index, weight, table, workspace, out, t, k, e)
        emit_experts_many(body, call, top_k, tiles)

    return Emulated(build("experts_b", emit))


@dataclass
class Pool:
    """Experts in memory; their parts as float64; the table of addresses."""

    body: ExpertBody
    count: int

    def __post_init__(self) -> None:
        shape = layout(self.body)
        generator = torch.Generator().manual_seed(self.count)
        self.memory = aligned_empty((self.count * shape.stride_bytes,), np.uint8)
        self.memory[...] = 0xFF
        self.parts: list[dict[str, Any]] = []
        for expert in range(self.count):
            self.parts.append({})
            for part in shape.parts:
                value = (torch.randn(part.shape, generator=generator) * 0.3).to(DTYPES[self.body.dtype])
                self.parts[-1][part.name] = value.double().numpy()
                place = expert * shape.stride_bytes + part.offset_bytes
                bits = value.view(-1).view(torch.uint8).numpy()
                self.memory[place : place + part.size_bytes] = bits
        first = self.memory.ctypes.data
        self.table = torch.tensor([first + expert * shape.stride_bytes for expert in range(self.count)])


def run(
    pool: Pool,
    top_k: int,
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    tiles: Tiles = TILES,
) -> torch.Tensor:
    """The kernel's result, with a workspace that is exactly as large as it says and full of NaNs."""
    body = pool.body
    fixed, token = workspace_bytes(body, top_k, pool.count)
    size = fixed + token * len(x)
    memory = aligned_empty((size + 64,), np.uint8)
    memory[...] = 0xFF
    out = aligned(torch.full_like(x, float("nan")))
    arguments = (aligned(x), aligned(index), aligned(weight), aligned(pool.table), memory[:size], out)
    kernel_of(body, top_k, tiles)("experts_b", *arguments)
    assert (memory[size:] == 0xFF).all()
    return plain(out)


def expected(pool: Pool, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> NDArray[np.float64]:
    """The reference, rounded where the kernel rounds."""
    kind = DTYPES[pool.body.dtype]
    names = ("gate", "up") if pool.body.gated else ("up",)
    out = np.zeros(tuple(x.shape))
    for expert, parts in enumerate(pool.parts):
        token, choice = np.nonzero(index.numpy() == expert)
        rows = x.to(kind).double().numpy()[token]
        variables = {name: rows @ parts[name].T + parts.get(f"{name}_bias", 0.0) for name in names}
        middle = torch.from_numpy(reference.activate(pool.body.activation, variables))
        down = middle.to(kind).double().numpy() @ parts["down"].T + parts.get("down_bias", 0.0)
        kept = torch.from_numpy(down / 16).to(torch.float16).double().numpy() * 16
        np.add.at(out, token, weight.double().numpy()[token, choice, None] * kept)
    return out


def inputs(
    body: ExpertBody, tokens: int, top_k: int, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, body.hidden, generator=generator)
    index = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].contiguous()
    return x, index, torch.rand(tokens, top_k, generator=generator)


def check(
    pool: Pool,
    top_k: int,
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    tiles: Tiles = TILES,
) -> None:
    error = relative_error(run(pool, top_k, x, index, weight, tiles), expected(pool, x, index, weight))
    assert error < TOLERANCE[pool.body.dtype]


@pytest.mark.parametrize(
    ("body", "top_k"),
    [
        (body_of(64, 72, "bfloat16", CLAMPED, bias=True), 4),
        (body_of(200, 96, "float16", SWIGLU), 2),
        (body_of(70, 37, "bfloat16", ("relu", "up"), gated=False, bias=True), 1),
        (body_of(66, 33, "float16", SWIGLU, bias=True), 6),
    ],
    ids=["biases", "plain", "no gate, odd sizes", "odd sizes"],
)
def test_experts_match_the_reference(body: ExpertBody, top_k: int) -> None:
    for experts, tokens in ((7, 9), (20, 17), (6, 130)):
        check(Pool(body, experts), top_k, *inputs(body, tokens, top_k, experts))


@pytest.mark.parametrize("tiles", [TILES, HOPPER_TILES], ids=["any GPU", "Hopper"])
@pytest.mark.parametrize(("tokens", "experts", "tile"), [(20, 5, 0), (190, 3, 1), (280, 1, 2)])
def test_every_tile_takes_experts_with_all_tokens_and_with_none(
    tokens: int, experts: int, tile: int, tiles: Tiles
) -> None:
    assert min(tile, len(tiles) - 1) == sum(tokens > experts * limit for limit, _ in tiles[:-1])
    body = body_of(64, 72, "bfloat16", CLAMPED, bias=True)
    pool = Pool(body, experts)
    x, index, weight = inputs(body, tokens, 1, pool.count)
    index[:] = pool.count - 1
    check(pool, 4, x, index, weight, tiles)


@pytest.mark.parametrize(("tokens", "experts"), [(80, 2), (150, 2)])
def test_groups_of_warps_without_rows_and_depths_of_odd_length(tokens: int, experts: int) -> None:
    body = body_of(200, 136, "bfloat16", CLAMPED, bias=True)
    pool = Pool(body, experts)
    x, index, weight = inputs(body, tokens, 1, pool.count)
    index[:] = 0
    index[: tokens // 2 - 5] = 1
    check(pool, 4, x, index, weight, HOPPER_PACKED_TILES)


def chosen_by(*counts: int) -> torch.Tensor:
    """Of as many tokens each expert, in an order that mixes them."""
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))][:, None].contiguous()


@pytest.mark.parametrize(
    ("number", "counts"),
    [(1, (70, 0, 1, 129, 64, 96)), (2, (1, 193, 0, 257))],
    ids=["many rows", "many tokens"],
)
def test_turned_tiles_take_any_number_of_tokens(number: int, counts: tuple[int, ...]) -> None:
    assert number == sum(sum(counts) > len(counts) * limit for limit, _ in HOPPER_TILES[:-1])
    index = chosen_by(*counts)
    body = body_of(64, 72, "bfloat16", CLAMPED, bias=True)
    pool = Pool(body, len(counts))
    x, _, weight = inputs(body, len(index), 1, pool.count)
    check(pool, 4, x, index, weight, HOPPER_TILES)


@pytest.mark.parametrize(
    ("intermediate", "counts"),
    [(136, (70, 0, 1, 129, 64, 96)), (200, (1, 193, 0, 200))],
    ids=["many rows", "many tokens"],
)
def test_blocks_that_stay_send_the_middle_of_piece_after_piece(
    intermediate: int, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MULTIPROCESSORS", 2)
    body = body_of(64, intermediate, "bfloat16", CLAMPED, bias=True)
    pool = Pool(body, len(counts))
    x, _, weight = inputs(body, sum(counts), 1, pool.count)
    check(pool, 4, x, chosen_by(*counts), weight, HOPPER_TILES)


def test_turned_tiles_of_experts_without_a_gate() -> None:
    tile = WarpgroupTile(rows=256, columns=128, groups=2, stages=4, copiers=True, widths=(128,))
    body = body_of(264, 24, "float16", ("relu", "up"), gated=False, bias=True)
    pool = Pool(body, 2)
    x, _, weight = inputs(body, 120, 1, pool.count)
    check(pool, 1, x, chosen_by(50, 70), weight, ((0, tile),))


def test_a_token_has_the_same_bits_wherever_its_experts_tokens_are() -> None:
    body = body_of(64, 72, "bfloat16", CLAMPED, bias=True)
    pool = Pool(body, 3)
    x, _, weight = inputs(body, 200, 1, pool.count)
    among = chosen_by(30, 140, 30)
    apart = among.clone()
    apart[20:] = torch.where(among[20:] == 1, 2, among[20:])
    runs = [run(pool, 4, x, index, weight, HOPPER_TILES) for index in (among, apart)]
    assert torch.equal(runs[0][:20], runs[1][:20])


def test_more_experts_than_a_block_has_threads() -> None:
    body = body_of(64, 72, "bfloat16", CLAMPED, bias=True)
    check(Pool(body, 300), 4, *inputs(body, 40, 4, 300))


def test_what_is_no_expert_contributes_nothing() -> None:
    body = body_of(64, 72, "bfloat16", CLAMPED, bias=True)
    pool = Pool(body, 3)
    x, index, weight = inputs(body, 40, 3, 3)
    index[::2, 1] = -1
    index[1::3, 0] = 3
    index[5] = torch.tensor([1 << 40, -(1 << 62), 1 << 32])
    out = run(pool, 4, x, index, weight)
    assert relative_error(out, expected(pool, x, index, weight)) < TOLERANCE[body.dtype]
    assert (out[5] == 0).all()
    index[:] = -1
    assert (run(pool, 4, x, index, weight) == 0).all()


def test_wide_results_are_made_in_slices() -> None:
    body = body_of(2100, 16, "float16")
    assert slice_columns(body.hidden, 16) < body.hidden
    check(Pool(body, 10), 16, *inputs(body, 12, 8, 10))


def test_the_same_input_gives_the_same_bits() -> None:
    body = body_of(64, 72, "bfloat16", CLAMPED, bias=True)
    pool = Pool(body, 7)
    given = inputs(body, 33, 4, 7)
    assert torch.equal(run(pool, 4, *given), run(pool, 4, *given))


POSITIVE: Expression = ("add", 1.0, ("mul", "up", "up"))


def activation_with(operator: str) -> Expression:
    """The operator on operands for which it is defined and smooth enough."""
    if operator == "sqrt":
        return (operator, POSITIVE)
    if operator == "pow":
        return (operator, POSITIVE, 0.5)
    if operator == "div":
        return (operator, "gate", POSITIVE)
    return (operator, "gate", "up") if ARITY[operator] == 2 else (operator, "gate")


def test_every_operator_of_an_activation_is_computed() -> None:
    total: Expression = 0.0
    for operator in ARITY:
        total = ("add", total, ("tanh", activation_with(operator)))
    body = body_of(32, 16, "float16", total)
    check(Pool(body, 4), 2, *inputs(body, 9, 2, 4))
