"""Experts that the CPU computes inside a captured GPU step: the handshake, its rate, and both sides at once.

python -m benchmarks.sharing MODULE

MODULE is what ``moec compile --modules-only`` made for the GPU and for the CPU; weights are random. Each figure is of a
layer in a graph of `LAYERS`, beside the ceilings of the same memory in the same run: reading by the CPU's threads, and
the link.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch

from benchmarks.kernels import reference
from benchmarks.kernels.module import Module, open_module, view
from benchmarks.support.common import print_rows, write_result
from benchmarks.support.torch_clock import seconds
from moec.artifacts.layout.experts import layout
from moec.artifacts.words import mailbox
from moec.artifacts.words.mailbox import SERVE, collect_name, mailbox_layout, post_name
from moec.runtime.sharing import team as teams
from moec.runtime.sharing.mailbox import Mailbox
from moec.runtime.sharing.team import SharedLayer, Team

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moec.artifacts.model import ExpertBody

LAYERS = 26
POOL_EXPERTS = 208
"""8 of each layer."""
EACH = POOL_EXPERTS // LAYERS
RANDOM_BYTES = 64 << 20
NOBODY = 1 << 40
"""Names no expert, but is not -1: a request without work."""
REPEATS = 5


@dataclass(frozen=True, eq=False)
class Bench:
    """Everything that is measured on."""

    gpu: Module
    cpu: Module
    body: ExpertBody
    pool: torch.Tensor
    """Pinned bytes ``[POOL_EXPERTS, stride]``."""
    host_table: torch.Tensor
    memory: torch.Tensor
    box: Mailbox
    sent: torch.Tensor
    layer: torch.Tensor

    @property
    def top_k(self) -> int:
        """K."""
        return self.gpu.model.experts[0].top_k

    def boxes(self, *names: str) -> list[torch.Tensor]:
        """Tensors of the mailbox as the GPU sees them: pinned memory has one address for both."""
        parts = []
        for name in names:
            place = getattr(self.box.layout, name)
            dtype = getattr(torch, place.dtype)
            begin = place.offset_bytes
            size = place.count * dtype.itemsize
            parts.append(self.memory[begin : begin + size].view(dtype))
        return parts


def open_bench(folder: Path) -> Bench:
    """Load both modules, and fill a pool of experts."""
    gpu, cpu = open_module(folder, torch.device("cuda", 0)), open_module(folder, torch.device("cpu"))
    body = gpu.model.bodies[0]
    stride = layout(body).stride_bytes
    pool = torch.empty(POOL_EXPERTS * stride, dtype=torch.uint8, pin_memory=True)
    block = (torch.randn(RANDOM_BYTES // 2) * 0.02).to(getattr(torch, body.dtype)).view(torch.uint8)
    for start in range(0, pool.numel(), RANDOM_BYTES):
        piece = pool[start : start + RANDOM_BYTES]
        piece.copy_(block[: piece.numel()])
    table = pool.data_ptr() + stride * torch.arange(POOL_EXPERTS, dtype=torch.int64)
    shape = mailbox_layout(body.hidden, gpu.model.experts[0].top_k)
    memory = torch.zeros(shape.size_bytes, dtype=torch.uint8, pin_memory=True)
    box = Mailbox(memory.data_ptr(), shape)
    zeros = torch.zeros(8, dtype=torch.int64, device="cuda")
    return Bench(
        gpu,
        cpu,
        body,
        pool.view(POOL_EXPERTS, stride),
        table,
        memory,
        box,
        zeros[:4].clone(),
        zeros[:1].clone(),
    )


def start_team(bench: Bench, threads: int) -> Team:
    """Threads over the pool, which is one layer's as far as they know."""
    bench.sent.zero_()
    torch.cuda.synchronize()
    # A copy: its start must be aligned as kernels want it.
    layers = [SharedLayer(bench.host_table.data_ptr(), POOL_EXPERTS, bench.top_k, 0, bench.body.intermediate)]
    team = Team(bench.cpu.functions.get(SERVE), bench.box, layers, threads)
    bench.box.words[mailbox.LIMIT] = 3 * 10**9
    return team


def layer_calls(
    bench: Bench, by_link: int, by_cpu: int, *, nobody: bool = False
) -> Iterator[Callable[[], None]]:
    """A call for each layer: request, copies of the GPU's experts and their kernel, sums; ``by_link`` -1: no kernel."""
    name, chosen = bench.body.name, bench.top_k
    x = torch.randn(1, bench.body.hidden, device="cuda")
    weight = torch.rand(1, chosen, device="cuda")
    words, index, weights, box_x, box_out = bench.boxes("words", "index", "weight", "x", "out")
    slots = torch.empty(chosen, bench.pool.shape[1], dtype=torch.uint8, device="cuda")
    table = torch.zeros(POOL_EXPERTS, dtype=torch.int64)
    for layer in range(LAYERS):
        experts = torch.randperm(EACH)[:chosen] + EACH * layer
        table[experts] = slots.data_ptr() + slots.shape[1] * torch.arange(chosen)
        copied = experts[: max(0, by_link)].tolist()
        gpu_index, cpu_index = (torch.full((1, chosen), -1) for _ in range(2))
        gpu_index[0, : max(0, by_link)] = experts[: max(0, by_link)]
        cpu_index[0, chosen - by_cpu :] = NOBODY if nobody else experts[chosen - by_cpu :]
        gpu_index, cpu_index = gpu_index.cuda(), cpu_index.cuda()
        out = torch.zeros(1, bench.body.hidden, device="cuda")
        post = _call(
            bench,
            post_name(name),
            x,
            cpu_index,
            weight,
            bench.layer,
            bench.sent,
            words,
            index,
            weights,
            box_x,
        )
        collect = _call(bench, collect_name(name), out, bench.sent, words, box_out)
        run = None
        if by_link >= 0:
            run = bench.gpu.bind(f"experts_{name}", x, gpu_index, weight, table.cuda(), out, tokens=1)

        def call(
            post: Callable[[], None] = post,
            run: Callable[[], None] | None = run,
            collect: Callable[[], None] = collect,
            copied: list[int] = copied,
        ) -> None:
            post()
            for place, expert in enumerate(copied):
                slots[place].copy_(bench.pool[expert], non_blocking=True)
            if run is not None:
                run()
            collect()

        call.held = slots  # type: ignore[attr-defined]
        call.check = (x, gpu_index, cpu_index, weight, out)  # type: ignore[attr-defined]
        yield call


def _call(bench: Bench, function: str, *tensors: torch.Tensor) -> Callable[[], None]:
    packed = bench.gpu.functions.get(function)
    views = [_gpu_view(tensor) for tensor in tensors]

    def call() -> None:
        packed(*views)

    call.held = tensors  # type: ignore[attr-defined]
    return call


def _gpu_view(tensor: torch.Tensor) -> Any:
    from moec.runtime.tensors import tensor_at

    if tensor.device.type == "cuda":
        return view(tensor)
    return tensor_at(tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), (2, 0))


def layer_seconds(
    bench: Bench, team: Team | None, by_link: int, by_cpu: int, *, nobody: bool = False
) -> float:
    """Median seconds of a layer."""
    calls = list(layer_calls(bench, by_link, by_cpu, nobody=nobody))
    if team is not None:
        team.begin()
    try:
        taken = seconds(calls, torch.device("cuda", 0), repeats=REPEATS)
    finally:
        if team is not None:
            team.end()
    if team is not None:
        team.check()
    return taken


def worst_error(bench: Bench, team: Team, by_link: int, by_cpu: int) -> float:
    """Of a layer's result, against float64, relative to the largest."""
    call = next(iter(layer_calls(bench, by_link, by_cpu)))
    team.begin()
    seconds([call], torch.device("cuda", 0), repeats=1)
    team.end()
    team.check()
    x, gpu_index, cpu_index, weight, out = call.check  # type: ignore[attr-defined]
    both = torch.where(gpu_index < 0, cpu_index, gpu_index)
    few = bench.pool[:EACH].cuda()
    expected = reference.experts(bench.body, few, x, both, weight)
    return float((out.double() - expected).abs().max() / expected.abs().max())


def read_rate(bench: Bench, threads: int) -> float:
    """GB/s at which threads read the pool."""
    words = bench.pool.numpy().reshape(-1).view(np.int64)
    parts = np.array_split(words, threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.max, parts))
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            rates.append(words.nbytes / (time.perf_counter() - start) / 1e9)
    return median(rates)


def link_rate(bench: Bench) -> float:
    """GB/s of copies of single experts to the GPU."""
    target = torch.empty_like(bench.pool[0], device="cuda")
    copies = [lambda row=row: target.copy_(bench.pool[row], non_blocking=True) for row in range(POOL_EXPERTS)]
    return target.numel() / seconds(copies, torch.device("cuda", 0), repeats=5, graph=False) / 1e9


@click.command()
@click.argument("module", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--threads", "thread_counts", multiple=True, type=int, default=(4, 8, 15, 16), show_default=True
)
@click.option("--pieces", multiple=True, type=int, default=(teams.CHUNKS_PER_THREAD,), show_default=True)
def main(module: Path, thread_counts: tuple[int, ...], pieces: tuple[int, ...]) -> None:
    """Measure sharing with the modules of MODULE."""
    bench = open_bench(module)
    size = layout(bench.body).expert_bytes
    link = link_rate(bench)
    nothing = layer_seconds(bench, None, -1, 0)
    print(f"link {link:.1f} GB/s; a layer without a request {nothing * 1e6:.2f} us", flush=True)
    rows: list[dict[str, Any]] = []
    for threads in thread_counts:
        read = read_rate(bench, threads)
        for each in pieces:
            teams.CHUNKS_PER_THREAD = each
            team = start_team(bench, threads)
            try:
                rows += cpu_rows(bench, team, size, read, nothing, each)
                if each == pieces[0]:
                    rows += both_rows(bench, team, size, read, link)
            except Exception as error:  # noqa: BLE001 - the other teams are worth seeing
                rows.append({"threads": threads, "what": f"failed: {error}"[:200]})
            finally:
                team.close()
            print_rows(rows[-16:])
    path = write_result("sharing", rows, link_gb_s=link, empty_layer_us=nothing * 1e6)
    print_rows(rows)
    print(path)


def cpu_rows(
    bench: Bench, team: Team, size: int, read: float, nothing: float, pieces: int
) -> Iterator[dict[str, Any]]:
    """The CPU's experts alone."""
    common = {"threads": team.threads, "pieces": pieces, "read GB/s": read}
    taken = layer_seconds(bench, team, -1, 1, nobody=True)
    yield {**common, "what": "handshake", "us": (taken - nothing) * 1e6}
    yield {**common, "what": "worst error", "error": worst_error(bench, team, 0, bench.top_k)}
    for count in range(1, bench.top_k + 1):
        taken = layer_seconds(bench, team, -1, count)
        rate = count * size / taken / 1e9
        yield {**common, "what": f"CPU {count}", "us": taken * 1e6, "GB/s": rate, "ratio": rate / read}


def both_rows(bench: Bench, team: Team, size: int, read: float, link: float) -> Iterator[dict[str, Any]]:
    """Every split of a layer whose experts are all missing: the GPU reads its part through the link."""
    for by_cpu in range(bench.top_k + 1):
        taken = layer_seconds(bench, team, bench.top_k - by_cpu, by_cpu)
        rate = bench.top_k * size / taken / 1e9
        yield {
            "threads": team.threads,
            "what": f"link {bench.top_k - by_cpu} + CPU {by_cpu}",
            "us": taken * 1e6,
            "GB/s": rate,
            "read GB/s": read,
            "ratio": rate / max(link, read),
            "of sum": rate / (link + read),
        }
    yield {"what": "worst error, both", "error": worst_error(bench, team, bench.top_k // 2, bench.top_k // 2)}


if __name__ == "__main__":
    main()
