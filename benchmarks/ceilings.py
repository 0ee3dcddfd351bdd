"""What this machine can do at best: device memory, the link, host memory, matrix products.

python -m benchmarks.ceilings

Rates in GB/s count bytes read and bytes written; of products in TFLOP/s. Without a GPU only the host is measured.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from benchmarks.support.common import print_rows, write_result
from moec.runtime.devices.measure import read_bandwidth
from moec.runtime.machine.threads import default_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

COPY_BYTES = 4 << 30
LINK_BYTES = 1 << 30
EXPERT_BYTES = 17_301_504
"""One expert of DeepSeek-V2-Lite in bfloat16."""
HOST_BYTES = 1 << 30
MATRIX = 8192


@click.command()
def main() -> None:
    """Measure, print, write ``results/ceilings.json``."""
    rows = [host_row()]
    if has_gpu():
        import torch

        device = torch.device("cuda", 0)
        rows += [copy_row(device), read_row(device), *link_rows(device), matrix_row(device)]
    path = write_result("ceilings", rows)
    print_rows(rows)
    print(path)


def has_gpu() -> bool:
    """Whether torch is there and sees a GPU."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def host_row() -> dict[str, Any]:
    """Reading host memory with all threads."""
    threads = default_threads()
    rate = read_bandwidth(threads, HOST_BYTES)
    return {"what": "host memory read", "rate": rate, "unit": "GB/s", "how": f"numpy max, {threads} threads"}


def copy_bandwidth(device: torch.device, size_bytes: int = COPY_BYTES) -> float:
    """GB/s of a copy within device memory, bytes read and written."""
    import torch

    from benchmarks.support.torch_clock import seconds

    source = torch.randint(-(1 << 62), 1 << 62, (size_bytes // 8,), device=device)
    target = torch.empty_like(source)
    time = seconds([lambda: target.copy_(source)], device, graph=False)
    assert torch.equal(source, target)
    return 2 * size_bytes / time / 1e9


def copy_row(device: torch.device) -> dict[str, Any]:
    """Device to device."""
    rate = copy_bandwidth(device)
    return {
        "what": "device copy",
        "rate": rate,
        "unit": "GB/s",
        "how": f"{COPY_BYTES >> 30} GiB, read + written",
    }


def read_row(device: torch.device) -> dict[str, Any]:
    """Reading device memory: the fastest of torch's reductions."""
    import torch

    from benchmarks.support.torch_clock import seconds

    data = torch.randn(COPY_BYTES // 4, device=device)
    pairs = data.view(torch.int64)
    reductions: dict[str, Callable[[], Any]] = {
        "sum": data.sum,
        "amax": data.amax,
        "sum of rows": lambda: data.view(-1, 8192).sum(1),
        "amax of int64": pairs.amax,
    }
    rates = {
        name: COPY_BYTES / seconds([call], device, graph=False) / 1e9 for name, call in reductions.items()
    }
    best = max(rates, key=lambda name: rates[name])
    return {"what": "device read", "rate": rates[best], "unit": "GB/s", "how": f"torch's {best} over 4 GiB"}


def link_rows(device: torch.device) -> list[dict[str, Any]]:
    """Pinned host memory to the device and back, in one piece and in pieces of an expert."""
    import torch

    from benchmarks.support.torch_clock import seconds

    host = (
        torch.frombuffer(bytearray(os.urandom(1 << 20)), dtype=torch.uint8)
        .repeat(LINK_BYTES >> 20)
        .pin_memory()
    )
    on_device = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    rows = []
    for size, name in ((LINK_BYTES, "1 GiB"), (EXPERT_BYTES, "17.3 MB")):
        count = LINK_BYTES // size
        parts = [slice(number * size, (number + 1) * size) for number in range(count)]
        for what, target, source in (
            ("host to device", on_device, host),
            ("device to host", host, on_device),
        ):
            calls = [
                lambda part=part, target=target, source=source: target[part].copy_(
                    source[part], non_blocking=True
                )
                for part in parts
            ]
            rate = size / seconds(calls, device, repeats=5, graph=False) / 1e9
            rows.append({"what": what, "rate": rate, "unit": "GB/s", "how": f"pinned, pieces of {name}"})
    return rows


def matrix_rate(device: torch.device, size: int = MATRIX) -> float:
    """TFLOP/s of torch's bfloat16 product of random square matrices."""
    import torch

    from benchmarks.support.torch_clock import seconds

    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    time = seconds([lambda: torch.matmul(left, right, out=out)], device, graph=False)
    return 2 * size**3 / time / 1e12


def matrix_row(device: torch.device) -> dict[str, Any]:
    """The matrix units through torch."""
    how = f"torch.matmul {MATRIX}^3 bfloat16, random"
    return {"what": "matrix product", "rate": matrix_rate(device), "unit": "TFLOP/s", "how": how}


if __name__ == "__main__":
    main()
