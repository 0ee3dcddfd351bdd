"""The CPU kernels against this machine's ceilings, measured in the same run and interleaved with them.

    python benchmarks/cpu_kernels.py [--repeats 7] [--lanes 16]

Prints a table and writes ``benchmarks/results/cpu_kernels.json``. A ratio is the median over the repeats of
(kernel's rate / ceiling's rate measured just before it), so that other users of the machine disturb both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import torch
import tvm

from benchmarks.common import write_result
from moec.artifacts.cache import PAGE_TOKENS
from moec.artifacts.experts import layout
from moec.artifacts.model import AttentionSpec, ExpertBody
from moec.compiler.kernels.cpu.attention import attention
from moec.compiler.kernels.cpu.emit import Argument, arguments, build, fill, i64, load, loop, registers, store
from moec.compiler.kernels.cpu.experts import experts
from moec.compiler.kernels.cpu.linear import linear
from moec.runtime.measure import cpu_model

if TYPE_CHECKING:
    from collections.abc import Callable

PROCESSORS = {16: "x86-64-v4", 8: "x86-64-v3", 4: "x86-64"}
READ_FLOATS = 1 << 27
FMA_STEPS = 1 << 16
TASKS = 256
SUMS = 12


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    kernel: str
    milliseconds: float
    read_gigabytes_per_second: float
    gigaflops: float
    ceiling: str
    ratio: float
    """Median over the repeats."""


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


def read_kernel(lanes: int) -> Any:
    """Sum a large array, each task a contiguous part."""

    def body() -> None:
        x, out = arguments(
            Argument("x", (READ_FLOATS,), "float32"), Argument("out", (TASKS, lanes), "float32")
        )
        part, width = READ_FLOATS // TASKS, 8 * lanes
        with loop(TASKS, parallel=True) as task:
            sums = registers(width)
            fill(sums, width, lanes)
            with loop(part // width) as step:
                for offset in range(0, width, lanes):
                    value = load(x, task * i64(part) + step * i64(width) + i64(offset), lanes)
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


def compiled(function: Any, lanes: int) -> Callable[..., None]:
    """Machine code of a kernel."""
    name = str(function.attrs["global_symbol"])
    target = tvm.target.Target({"kind": "llvm", "mcpu": PROCESSORS[lanes]})
    kernel: Callable[..., None] = tvm.compile(tvm.IRModule({name: function}), target=target)[name]
    return kernel


def linear_cases(lanes: int) -> list[Case]:
    """A 256 MiB matrix at several token counts."""
    rows, columns = 65536, 2048
    kernel = compiled(
        linear(rows=rows, columns=columns, dtype="bfloat16", batch=None, bias=False, lanes=lanes), lanes
    )
    weight = torch.randn(rows, columns, dtype=torch.bfloat16)
    cases = []
    for tokens, ceiling in ((1, "read"), (4, "read"), (8, "read"), (128, "multiply")):
        x = torch.randn(tokens, columns)
        out = torch.zeros(tokens, rows)
        call = _bind(kernel, x, weight, out)
        cases.append(
            Case(
                f"linear bf16 65536x2048, T={tokens}",
                call,
                weight.nbytes,
                2 * tokens * weight.numel(),
                ceiling,
            )
        )
    return cases


def expert_cases(lanes: int) -> list[Case]:
    """DeepSeek-V2-Lite's experts: 6 of 64; decode steps walk through the pool so that it is read from memory."""
    body = ExpertBody("b", 2048, 1408, True, False, False, ("mul", ("silu", "gate"), "up"), "bfloat16")
    kernel = compiled(experts(body, lanes=lanes), lanes)
    shape, count, chosen = layout(body), 64, 6
    memory = torch.randn(count * shape.stride_bytes // 2 + 32, dtype=torch.bfloat16)
    begin = memory.data_ptr() + -memory.data_ptr() % 64
    table = torch.tensor([begin + expert * shape.stride_bytes for expert in range(count)], dtype=torch.int64)
    cases = []
    for tokens, ceiling in ((1, "read"), (128, "multiply")):
        x = torch.randn(tokens, body.hidden)
        weight, out = torch.rand(tokens, chosen), torch.zeros(tokens, body.hidden)
        steps = 8 if tokens == 1 else 1
        choices = [
            torch.randperm(count)[: tokens * chosen].reshape(tokens, chosen).contiguous()
            if tokens == 1
            else torch.stack([torch.randperm(count)[:chosen] for _ in range(tokens)])
            for _ in range(steps)
        ]
        calls = [_bind(kernel, x, index, weight, table, out) for index in choices]
        used = sum(len(set(index.flatten().tolist())) for index in choices)
        flops = 2 * 3 * body.hidden * body.intermediate * tokens * chosen * steps
        name = f"experts bf16 2048/1408, 6 of 64, T={tokens}" + (" (8 calls)" if steps > 1 else "")
        cases.append(Case(name, _sequence(calls), used * shape.expert_bytes, flops, ceiling, memory))
    return cases


def attention_cases(lanes: int) -> list[Case]:
    """Decode of one token and a prefill of 256, over 8192 positions."""
    cases = []
    for spec in (
        AttentionSpec("gqa", 32, 8, 128, 128, 0.09, 0, 0, 0.0, False, False, "bfloat16", None),
        AttentionSpec("mla", 16, 1, 576, 512, 0.09, 0, 0, 0.0, False, True, "bfloat16", None),
    ):
        kernel = compiled(attention(spec, lanes=lanes), lanes)
        context = 8192
        pages = context // PAGE_TOKENS
        cache = [torch.randn(pages, spec.kv_heads, PAGE_TOKENS, spec.key_dim, dtype=torch.bfloat16)]
        if not spec.latent:
            cache.append(torch.randn(pages, spec.kv_heads, PAGE_TOKENS, spec.value_dim, dtype=torch.bfloat16))
        table = torch.randperm(pages).reshape(1, pages).int()
        for tokens in (1, 256):
            q = torch.randn(1, tokens, spec.query_heads, spec.key_dim)
            out = torch.zeros(1, tokens, spec.query_heads, spec.value_dim)
            position = torch.arange(context - tokens, context).int()
            call = _bind(kernel, q, *cache, table, torch.zeros(tokens, dtype=torch.int32), position, out)
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


def _bind(kernel: Callable[..., None], *tensors: torch.Tensor) -> Callable[[], None]:
    return lambda: kernel(*tensors)


def _sequence(calls: list[Callable[[], None]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def seconds(call: Callable[[], None]) -> float:
    """Of the faster of two calls."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(cases: list[Case], lanes: int, repeats: int) -> tuple[dict[str, float], list[Row]]:
    """Ceilings (bytes/s, flop/s: medians) and the table."""
    data, factors = torch.zeros(READ_FLOATS), torch.rand(2 * lanes)
    totals = torch.zeros(TASKS, lanes)
    read = _bind(compiled(read_kernel(lanes), lanes), data, totals)
    multiply = _bind(compiled(multiply_kernel(lanes), lanes), factors, totals)
    rates: dict[str, list[float]] = {"read": [], "multiply": []}
    ratios: dict[str, list[float]] = {case.name: [] for case in cases}
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(repeats):
        for case in cases:
            rates["read"].append(data.nbytes / seconds(read))
            rates["multiply"].append(2 * SUMS * lanes * FMA_STEPS * TASKS / seconds(multiply))
            times[case.name].append(seconds(case.call))
            work = case.bytes_read if case.ceiling == "read" else case.flops
            ratios[case.name].append(work / times[case.name][-1] / rates[case.ceiling][-1])
    rows = []
    for case in cases:
        taken = statistics.median(times[case.name])
        ratio = statistics.median(ratios[case.name])
        rows.append(
            Row(
                case.name,
                taken * 1e3,
                case.bytes_read / taken / 1e9,
                case.flops / taken / 1e9,
                case.ceiling,
                ratio,
            )
        )
    return {name: statistics.median(values) for name, values in rates.items()}, rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lanes", type=int, choices=sorted(PROCESSORS), default=16)
    arguments_ = parser.parse_args()
    torch.manual_seed(0)
    lanes = arguments_.lanes
    cases = [*linear_cases(lanes), *expert_cases(lanes), *attention_cases(lanes)]
    ceilings, rows = measure(cases, lanes, arguments_.repeats)
    threads = os.environ["TVM_NUM_THREADS"]
    print(f"{cpu_model()}, {threads} threads, {lanes} lanes")
    print(f"read {ceilings['read'] / 1e9:.1f} GB/s, multiply-add {ceilings['multiply'] / 1e9:.0f} GFLOP/s")
    for row in rows:
        print(
            f"{row.kernel:48} {row.milliseconds:9.2f} ms {row.read_gigabytes_per_second:7.1f} GB/s "
            f"{row.gigaflops:7.0f} GFLOP/s  {row.ratio:5.2f} of {row.ceiling}"
        )
    write_result(
        "cpu_kernels",
        [asdict(row) for row in rows],
        threads=int(threads),
        lanes=lanes,
        load_average=os.getloadavg(),
        ceilings={"read_bytes_per_second": ceilings["read"], "multiply_flops": ceilings["multiply"]},
    )


if __name__ == "__main__":
    main()
