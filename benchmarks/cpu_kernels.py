"""The CPU kernels against this machine's ceilings, measured in the same run and interleaved with them.

    python -m benchmarks.cpu_kernels [--repeats 7] [--level x86-64-v4-bf16] [--only experts]

Prints a table and writes ``benchmarks/results/cpu_kernels-<level>.json``. A ratio is that of the best of the repeats:
other users of the machine disturb both, and the least disturbed of each is nearest to what the machine can do. With
``--threads 1`` the clock is that of the thread, which stands still while others have the core.

The kernels are compiled into a library first. ``--build FILE`` does only that, and ``--library FILE`` runs one on a
machine without the compiler.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.support.common import write_result
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
from benchmarks.support.mailbox_team import CHOSEN, MailboxTeam
from benchmarks.support.random_experts import random_experts
from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.layout.experts import layout
from moec.artifacts.words.mailbox import SERVE
from moec.runtime.devices.measure import cpu_model
from moec.runtime.machine.libraries import LibraryFunctions, load_runtime

if TYPE_CHECKING:
    from collections.abc import Callable

POOL_BYTES = 1 << 30
"""Of experts: more than caches hold."""
STEP_BYTES = 1 << 29
"""That a measured call reads at least: decode steps one after the other, each with other experts."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    kernel: str
    milliseconds: float
    read_gigabytes_per_second: float
    gigaflops: float
    ceiling: str
    ratio: float


@dataclass(frozen=True)
class Case:
    """A kernel call, and what it has to read and compute at least."""

    name: str
    call: Callable[[], None]
    bytes_read: int
    flops: int
    ceiling: str
    held: torch.Tensor | None = None
    """Memory that the call reaches through addresses only."""


def linear_cases(functions: LibraryFunctions) -> list[Case]:
    """A 256 MiB matrix at several token counts."""
    kernel = functions.get("linear")
    weight = torch.randn(LINEAR_ROWS, LINEAR_COLUMNS, dtype=torch.bfloat16)
    cases = []
    for tokens, ceiling in ((1, "read"), (4, "read"), (8, "read"), (128, "multiply")):
        x = torch.randn(tokens, LINEAR_COLUMNS)
        out = torch.zeros(tokens, LINEAR_ROWS)
        name = f"linear bf16 {LINEAR_ROWS}x{LINEAR_COLUMNS}, T={tokens}"
        flops = 2 * tokens * weight.numel()
        cases.append(Case(name, _bind(kernel, x, weight, out), weight.nbytes, flops, ceiling))
    return cases


def expert_cases(functions: LibraryFunctions) -> list[Case]:
    """DeepSeek-V2-Lite's experts in each format."""
    return [case for kind in FORMATS for case in _experts(functions, kind)]


def _experts(functions: LibraryFunctions, kind: str) -> list[Case]:
    """Decode steps that walk through a pool too large for caches, and a prompt."""
    body = expert_body(kind)
    kernel, shape = functions.get(f"experts_{body.name}"), layout(body)
    count = POOL_BYTES // shape.stride_bytes
    memory, table = random_experts(body, count)
    cases = []
    for tokens, ceiling in ((1, "read"), (4, "read"), (128, "multiply")):
        x = torch.randn(tokens, body.hidden)
        weight, out = torch.rand(tokens, CHOSEN), torch.zeros(tokens, body.hidden)
        if ceiling == "read":
            steps = -(-STEP_BYTES // (CHOSEN * shape.expert_bytes))
            # All tokens of a step choose the same experts: each is read once.
            choices = [torch.randperm(count)[:CHOSEN].expand(tokens, -1).contiguous() for _ in range(steps)]
        else:
            choices = [torch.stack([torch.randperm(min(count, 64))[:CHOSEN] for _ in range(tokens)])]
        calls = [_bind(kernel, x, index, weight, table, out) for index in choices]
        used = sum(len(set(index.flatten().tolist())) for index in choices)
        flops = 2 * 3 * body.hidden * body.intermediate * tokens * CHOSEN * len(choices)
        name = f"experts {kind} {body.hidden}/{body.intermediate}, T={tokens}, {len(choices)} calls"
        cases.append(Case(name, _sequence(calls), used * shape.expert_bytes, flops, ceiling, memory))
    return cases


def serve_cases(functions: LibraryFunctions) -> list[Case]:
    """The loop that shares a GPU's misses, in each format: requests of one token, and of four that choose alike."""
    bodies = [expert_body(kind) for kind in FORMATS]
    team = MailboxTeam(functions.get(SERVE), bodies, POOL_BYTES)
    cases = []
    for number, kind in enumerate(FORMATS):
        body, shape = bodies[number], layout(bodies[number])
        steps = -(-STEP_BYTES // (CHOSEN * shape.expert_bytes))
        for tokens in (1, 4):
            sizes = f"{body.hidden}/{body.intermediate}, {team.threads} threads"
            name = f"serve {kind} {sizes}, T={tokens}, {steps} requests"
            flops = 2 * 3 * body.hidden * body.intermediate * tokens * CHOSEN * steps
            call = _bind(team.ask, number, steps, tokens)
            cases.append(Case(name, call, steps * CHOSEN * shape.expert_bytes, flops, "read"))
    return cases


def attention_cases(functions: LibraryFunctions) -> list[Case]:
    """Decode of one token and a prefill of 256, over 8192 positions."""
    cases = []
    for spec in ATTENTIONS:
        kernel = functions.get(f"attention_{spec.name}")
        context = 8192
        pages = context // PAGE_TOKENS
        cache = [torch.randn(pages, spec.kv_heads, PAGE_TOKENS, spec.key_dim, dtype=torch.bfloat16)]
        if not spec.latent:
            cache.append(torch.randn(pages, spec.kv_heads, PAGE_TOKENS, spec.value_dim, dtype=torch.bfloat16))
        table = torch.randperm(pages).reshape(1, pages).int()
        for tokens in (1, 256):
            q = torch.randn(1, tokens, spec.query_heads, spec.key_dim)
            widths = [spec.key_dim] if spec.latent else [spec.key_dim, spec.value_dim]
            own = [torch.randn(1, tokens, spec.kv_heads, width) for width in widths]
            out = torch.zeros(1, tokens, spec.query_heads, spec.value_dim)
            position = torch.arange(context - tokens, context).int()
            rows = torch.zeros(tokens, dtype=torch.int32)
            call = _bind(kernel, q, *own, *cache, table, rows, position, out)
            flops = 2 * tokens * spec.query_heads * (spec.key_dim + spec.value_dim) * context
            bytes_read = sum(tensor.nbytes for tensor in cache)
            cases.append(
                Case(
                    f"attention {spec.name} bf16, 8192 positions, T={tokens}",
                    call,
                    bytes_read,
                    flops,
                    "multiply",
                )
            )
    return cases


def _bind(kernel: Callable[..., None], *tensors: Any) -> Callable[[], None]:
    return lambda: kernel(*tensors)


def _sequence(calls: list[Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def seconds(call: Callable[[], None], clock: Callable[[], float]) -> float:
    """Of the faster of two calls."""
    times = []
    for _ in range(2):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def measure(
    functions: LibraryFunctions, cases: list[Case], lanes: int, repeats: int, clock: Callable[[], float]
) -> tuple[dict[str, float], list[Row]]:
    """Ceilings (bytes/s, flop/s) and the table."""
    # Written once: all pages of what was never written are one page of zeros.
    data, factors = torch.ones(READ_FLOATS), torch.rand(2 * lanes)
    totals = torch.zeros(TASKS, lanes)
    read = _bind(functions.get("read"), data, totals)
    multiply = _bind(functions.get("multiply"), factors, totals)
    ceilings = {"read": 0.0, "multiply": 0.0}
    times = {case.name: float("inf") for case in cases}
    for _ in range(repeats):
        for case in cases:
            ceilings["read"] = max(ceilings["read"], data.nbytes / seconds(read, clock))
            rate = 2 * SUMS * lanes * FMA_STEPS * TASKS / seconds(multiply, clock)
            ceilings["multiply"] = max(ceilings["multiply"], rate)
            times[case.name] = min(times[case.name], seconds(case.call, clock))
    return ceilings, [_row(case, times[case.name], ceilings[case.ceiling]) for case in cases]


def _row(case: Case, taken: float, ceiling: float) -> Row:
    work = case.bytes_read if case.ceiling == "read" else case.flops
    rates = case.bytes_read / taken / 1e9, case.flops / taken / 1e9
    return Row(case.name, taken * 1e3, *rates, case.ceiling, work / taken / ceiling)


CASES = {"linear": linear_cases, "experts": expert_cases, "serve": serve_cases, "attention": attention_cases}


def build(level: str, path: Path) -> None:
    """Compile the library, which is all that needs the compiler."""
    from benchmarks.support.cpu_library_build import build_library

    build_library(level, path)


def main() -> None:
    """Compile or load, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--level", choices=LEVELS, default="x86-64-v4", help="instruction set")
    parser.add_argument("--only", choices=sorted(CASES), action="append", help="kinds of kernels")
    parser.add_argument("--build", type=Path, metavar="FILE", help="compile the kernels, and measure nothing")
    parser.add_argument("--library", type=Path, metavar="FILE", help="what --build made for this level")
    parser.add_argument("--threads", type=int, help="of the kernels (default: all CPUs)")
    options = parser.parse_args()
    if options.build:
        build(options.level, options.build)
        return
    threads = load_runtime(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = options.library or Path(folder) / "kernels.so"
        if options.library is None:
            build(options.level, path)
        functions = LibraryFunctions([path])
        cases = [case for kind in options.only or CASES for case in CASES[kind](functions)]
        clock = time.thread_time if threads == 1 else time.perf_counter
        ceilings, rows = measure(functions, cases, LEVELS[options.level], options.repeats, clock)
    print(f"{cpu_model()}, {threads} threads, {options.level}")
    print(f"read {ceilings['read'] / 1e9:.1f} GB/s, multiply-add {ceilings['multiply'] / 1e9:.0f} GFLOP/s")
    for row in rows:
        print(
            f"{row.kernel:58} {row.milliseconds:9.2f} ms {row.read_gigabytes_per_second:7.1f} GB/s "
            f"{row.gigaflops:7.0f} GFLOP/s  {row.ratio:5.2f} of {row.ceiling}"
        )
    write_result(
        f"cpu_kernels-{options.level}",
        [asdict(row) for row in rows],
        threads=threads,
        level=options.level,
        load_average=os.getloadavg(),
        ceilings={"read_bytes_per_second": ceilings["read"], "multiply_flops": ceilings["multiply"]},
    )


if __name__ == "__main__":
    main()
