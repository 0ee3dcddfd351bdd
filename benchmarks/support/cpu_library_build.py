"""Compiles the kernels of ``cpu_kernels`` into a library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.support.cpu_library import (
    ATTENTIONS,
    FMA_STEPS,
    FORMATS,
    LEVELS,
    LINEAR_COLUMNS,
    LINEAR_ROWS,
    READ_FLOATS,
    SUMS,
    TASKS,
    expert_body,
)
from moec.compiler.kernels.cpu.attention import attention
from moec.compiler.kernels.cpu.experts import experts
from moec.compiler.kernels.cpu.linear import linear
from moec.compiler.kernels.cpu.pair_products import AVX512_BF16
from moec.compiler.kernels.cpu.serve import serve
from moec.compiler.kernels.cpu.weights import PLAIN_LINES
from moec.compiler.kernels.emit import (
    Argument,
    arguments,
    build,
    fill,
    i64,
    keep,
    load,
    loop,
    prefetch,
    registers,
    store,
)
from moec.compiler.lowering.tvm_targets import LLVM_FEATURES
from tests.support.machine_code import machine_code

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


LINE_FLOATS = 16
"""Of a cache line."""


def build_library(level: str, path: Path) -> None:
    """Compile every kernel for an instruction set."""
    mcpu, features = LLVM_FEATURES.get(level, (level, ()))
    machine_code(*_functions(level), mcpu=mcpu, mattr=list(features)).export_library(str(path))


def _functions(level: str) -> Iterator[Any]:
    lanes, pairs = LEVELS[level], AVX512_BF16 if level == "x86-64-v4-bf16" else None
    yield read_kernel(lanes)
    yield multiply_kernel(lanes)
    yield linear(
        rows=LINEAR_ROWS,
        columns=LINEAR_COLUMNS,
        dtype="bfloat16",
        batch=None,
        bias=False,
        lanes=lanes,
        pairs=pairs,
    )
    for kind in FORMATS:
        yield experts(expert_body(kind), lanes=lanes, pairs=pairs)
    yield serve([expert_body(kind) for kind in FORMATS], lanes=lanes, machine="x86_64")
    for spec in ATTENTIONS:
        yield attention(spec, lanes=lanes).with_attr("global_symbol", f"attention_{spec.name}")


def read_kernel(lanes: int) -> Any:
    """Sum a large array, each task a contiguous part, which is asked for ahead as the kernels' rows are."""

    def body() -> None:
        x, out = arguments(
            Argument("x", (READ_FLOATS,), "float32"), Argument("out", (TASKS, lanes), "float32")
        )
        part, width = READ_FLOATS // TASKS, 8 * lanes
        with loop(TASKS, parallel=True) as task:
            sums = registers(width)
            fill(sums, width, lanes)
            with loop(part // width) as step:
                place = keep(task * i64(part) + step * i64(width))
                for line in range(0, width, LINE_FLOATS):
                    for ahead in PLAIN_LINES:
                        prefetch(x, place + i64(line + ahead * LINE_FLOATS))
                for offset in range(0, width, lanes):
                    value = load(x, place + i64(offset), lanes)
                    store(sums, offset, load(sums, offset, lanes) + value, lanes)
            _store_total(sums, 8, out, task, lanes)

    return build("read", body)


def multiply_kernel(lanes: int) -> Any:
    """Independent multiply-adds in registers."""

    def body() -> None:
        x, out = arguments(Argument("x", (2 * lanes,), "float32"), Argument("out", (TASKS, lanes), "float32"))
        with loop(TASKS, parallel=True) as task:
            sums = registers(SUMS * lanes)
            fill(sums, SUMS * lanes, lanes)
            factor, term = load(x, i64(0), lanes), load(x, i64(lanes), lanes)
            with loop(FMA_STEPS):
                for offset in range(0, SUMS * lanes, lanes):
                    store(sums, offset, load(sums, offset, lanes) * factor + term, lanes)
            _store_total(sums, SUMS, out, task, lanes)

    return build("multiply", body)


def _store_total(sums: Any, count: int, out: Any, task: Any, lanes: int) -> None:
    total = load(sums, 0, lanes)
    for number in range(1, count):
        total = total + load(sums, number * lanes, lanes)
    store(out, task * i64(lanes), total, lanes)
