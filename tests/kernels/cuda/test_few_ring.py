"""Weights of few tokens' experts through rings in shared memory: the emulator copies only what is waited for."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tvm.script.ir_builder import tirx as builder

from moec.artifacts.model import ExpertBody
from moec.compiler.kernels.cuda.experts.beside import experts_beside
from moec.compiler.kernels.cuda.experts.call import ExpertCall
from moec.compiler.kernels.cuda.experts.down_few import down_tiling, emit_down_few
from moec.compiler.kernels.cuda.experts.few import emit_gate_up_few, gate_up_tiling, middle_elements
from moec.compiler.kernels.cuda.experts.kernel import experts_cached
from moec.compiler.kernels.cuda.experts.rings import FIRST, SECOND, in_registers
from moec.compiler.kernels.cuda.few.ring import REGISTERS
from moec.compiler.kernels.cuda.primitives import call
from moec.compiler.kernels.emit import Argument, arguments, build, symbol
from moec.compiler.kernels.linear_shape import LinearShape
from moec.compiler.kernels.rows.product import Product
from moec.runtime.tensors import aligned_empty
from tests.support.cuda_emulator import Emulated
from tests.support.expert_pool import Pool, random_step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moec.compiler.kernels.cuda.few.tiling import Tiling

BODY = ExpertBody("ringed", 328, 280, True, False, True, ("mul", ("silu", "gate"), "up"), "bfloat16")
"""Several rounds of each product, the last of which is not whole."""
IN_REGISTERS = (
    (2048, 1408),
    (2048, 768),
    (2048, 1024),
    (1536, 576),
    (4096, 6400),
    (4096, 1536),
    (3072, 1536),
    (64, 32),
    (88, 56),
)
IN_RINGS = (
    (4096, 14336),
    (6144, 32768),
    (7168, 2048),
    (7168, 4864),
    (2880, 2880),
    (3584, 2560),
    (2560, 1536),
    (4096, 1408),
)
BLOCK_BYTES = 99 << 10
"""Of shared memory that a block has at most on the GPUs that have least."""
MULTIPROCESSOR_BYTES, RESERVED_BYTES = 228 << 10, 1 << 10
"""Of shared memory on a Hopper GPU, and of it for each block."""


def tilings() -> tuple[Tiling, Tiling]:
    """Of both launches, with rings as deep as three rounds."""
    first, second = gate_up_tiling(BODY), down_tiling(BODY, several=True)
    first = replace(first, column_warps=4, row_warps=1, unroll=1, ring=3)
    second = replace(second, column_warps=2, row_warps=2, unroll=2, ring=3)
    assert first.rounds(BODY.hidden) > 2
    assert second.rounds(BODY.intermediate) > 2
    return first, second


def kernel(first: Tiling, second: Tiling) -> Emulated:
    """The two launches of few tokens alone."""

    def emit() -> None:
        tokens, chosen, count, size = symbol("T"), symbol("K"), symbol("E"), symbol("W")
        x, index, weight, table, workspace, out = arguments(
            Argument("x", (tokens, BODY.hidden), "float32"),
            Argument("index", (tokens, chosen), "int64"),
            Argument("weight", (tokens, chosen), "float32"),
            Argument("table", (count,), "int64"),
            Argument("workspace", (size,), "uint8"),
            Argument("out", (tokens, BODY.hidden), "float32"),
        )
        own = ExpertCall(x, index, weight, table, workspace, out, tokens, chosen, count)
        middle = builder.decl_buffer(workspace.shape, "uint16", data=workspace.data, align=64)
        emit_gate_up_few(BODY, own, middle, first)
        emit_down_few(BODY, own, middle, second)

    return Emulated(build("few", emit))


def run(compiled: Emulated, pool: Pool, x: Any, index: Any, weight: Any) -> NDArray[np.float32]:
    def aligned(array: NDArray[Any]) -> NDArray[Any]:
        copy = aligned_empty(array.shape, array.dtype)
        copy[...] = array
        return copy

    space = aligned_empty((2 * index.size * middle_elements(BODY),), np.uint8)
    space[...] = 0xFF
    out = aligned_empty(x.shape, np.float32)
    compiled("few", *map(aligned, (x, index, weight)), pool.table, space, out)
    return out


@pytest.mark.parametrize(("tokens", "chosen"), [(1, 4), (5, 3)])
def test_rings_have_the_bits_of_registers(tokens: int, chosen: int) -> None:
    generator = torch.Generator().manual_seed(1)
    pool = Pool(BODY, 6, generator)
    step = random_step(generator, BODY, tokens, chosen, 6)
    step[1][0, 0] = 3
    first, second = tilings()
    ringed = run(kernel(first, second), pool, *step)
    held = run(kernel(replace(first, ring=0), replace(second, ring=0)), pool, *step)
    assert np.array_equal(ringed, held)
    expected = pool.expected(*step)
    assert np.abs(ringed - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("late", ["never", "a round late"])
def test_what_is_not_awaited_is_not_there(late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of these kernels would notice a wait that is missing, or too short by one round."""

    def changed(name: str, *given: Any) -> None:
        if name != "copy_wait":
            call(name, *given)
        elif late != "never":
            call(name, *(number + 1 for number in given))

    monkeypatch.setattr("moec.compiler.kernels.cuda.few.ring.call", changed)
    generator = torch.Generator().manual_seed(2)
    pool = Pool(BODY, 4, generator)
    x, _, weight = random_step(generator, BODY, 1, 3, 4)
    out = run(kernel(*tilings()), pool, x, np.array([[0, 1, 2]]), weight)
    assert not np.isfinite(out).all()


def gated(hidden: int, intermediate: int) -> ExpertBody:
    return ExpertBody(
        "sized", hidden, intermediate, True, True, True, ("mul", ("silu", "gate"), "up"), "float16"
    )


@pytest.mark.parametrize(("hidden", "intermediate"), IN_REGISTERS + IN_RINGS)
def test_shapes_go_the_way_that_was_faster(hidden: int, intermediate: int) -> None:
    body = gated(hidden, intermediate)
    held = (hidden, intermediate) in IN_REGISTERS
    assert in_registers(body) == held
    tilings = gate_up_tiling(body), down_tiling(body, several=True)
    assert all((tiling.ring == 0) == held for tiling in tilings)


@pytest.mark.parametrize(("hidden", "intermediate"), IN_RINGS)
def test_blocks_have_room_on_every_gpu(hidden: int, intermediate: int) -> None:
    sizes = shared_bytes(experts_cached(gated(hidden, intermediate)).script())
    assert len(sizes) == 2
    assert max(sizes) <= BLOCK_BYTES


def test_two_blocks_of_a_launch_fit_or_one_of_each() -> None:
    """With a shared expert's product in the first one: DeepSeek-V3's shape."""
    body = gated(7168, 2048)
    product = Product((LinearShape(7168, 4096, "float16", None, False),), None, "x")
    sizes = shared_bytes(experts_beside("beside", body, (product,)).script())
    assert 2 * (max(sizes) + RESERVED_BYTES) <= MULTIPROCESSOR_BYTES
    threads = [tiling.threads for tiling in (gate_up_tiling(body), down_tiling(body, several=True))]
    assert 2 * max(threads) * max(FIRST.registers, SECOND.registers) <= REGISTERS


def shared_bytes(script: str) -> list[int]:
    """Of a block of each launch: what a kernel's text allocates."""
    sizes = []
    for launch in script.split('thread="threadIdx.x"')[1:]:
        found = re.findall(
            r'T\.alloc_(?:shared|buffer)\(\((\d+),\)(?:, "(\w+)")?(?:, scope="([\w.]+)")?', launch
        )
        kinds = [(int(size), dtype or "float32") for size, dtype, scope in found if not scope.startswith("l")]
        sizes.append(sum(size * int(re.sub(r"\D", "", dtype)) // 8 for size, dtype in kinds))
    return sizes
