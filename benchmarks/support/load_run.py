"""One measurement of loading in a process of its own, printed as JSON; ``benchmarks.load`` starts it.

A GPU starts only once in a process, and what a process has read or pinned makes the next load another one.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec import runtime
from moec.artifacts.files.reader import open_bundle, read_manifest, weight_names

if TYPE_CHECKING:
    from collections.abc import Callable

PIECE_BYTES = 4 << 20
"""Of one read, as the runtime's."""
HASH_BYTES = 64 << 20
PROMPT_TOKENS = 8


@click.command()
@click.argument("what", type=click.Choice(["read", "hash", "start", "load"]))
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--verify", type=click.Choice(["full", "once", "sizes"]), default="sizes", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=os.cpu_count() or 1)
@click.option("--read-gib", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--direct", is_flag=True, help="Read past the system's cache; a tmpfs cannot.")
@click.option("--cold", is_flag=True, help="Let the system forget the files first; a tmpfs cannot.")
def main(
    what: str,
    bundle: Path,
    device: str,
    verify: Any,
    threads: int,
    read_gib: int,
    direct: bool,
    cold: bool,
) -> None:
    """Measure WHAT of BUNDLE."""
    files = [bundle / name for name in weight_names(read_manifest(bundle.absolute()))]
    if cold:
        for file in files:
            forget(file)
    measurements: dict[str, Callable[[], dict[str, float]]] = {
        "read": lambda: {"gb_s": read_rate(files, threads, read_gib << 30, direct=direct)},
        "hash": lambda: {"gb_s": hash_rate(threads)},
        "start": lambda: start_times(bundle, device),
        "load": lambda: load_times(bundle, device, verify),
    }
    print(json.dumps(measurements[what]()))


def forget(file: Path) -> None:
    """Take a file out of the system's cache, where it is not kept in memory anyway; what is not on disk goes there."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def read_rate(files: list[Path], threads: int, most_bytes: int, *, direct: bool) -> float:
    """GB/s of reading files by several threads, each piece into the same memory again.

    Args:
        files: read in this order.
        threads: how many.
        most_bytes: where the files have more, the rest is left.
        direct: past the system's cache.
    """
    handles = [os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0)) for file in files]
    places = [
        (handle, start)
        for handle, file in zip(handles, files, strict=True)
        for start in range(0, file.stat().st_size, PIECE_BYTES)
    ][: max(1, most_bytes // PIECE_BYTES)]
    queue, lock = iter(places), threading.Lock()

    def work(_: int) -> int:
        # Reading past the cache takes memory that begins with a page.
        buffer, total = mmap.mmap(-1, PIECE_BYTES), 0
        while True:
            with lock:
                place = next(queue, None)
            if place is None:
                return total
            total += os.preadv(place[0], [buffer], place[1])

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        total = sum(pool.map(work, range(threads)))
        seconds = time.perf_counter() - started
    for handle in handles:
        os.close(handle)
    return total / seconds / 1e9


def hash_rate(threads: int) -> float:
    """GB/s of SHA-256 in several threads."""
    data = os.urandom(HASH_BYTES)

    def work(_: int) -> None:
        hashlib.sha256(data).digest()

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(work, range(2 * threads)))
        return 2 * threads * HASH_BYTES / (time.perf_counter() - started) / 1e9


def start_times(bundle: Path, device: str) -> dict[str, float]:
    """What has to happen before anything can be copied, one after the other."""
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
    from moec.runtime.devices.cuda.modules.architecture import choose_cuda_target
    from moec.runtime.devices.cuda.modules.libraries import load_cuda_libraries
    from moec.runtime.devices.names import parse_ordinal
    from moec.runtime.machine.libraries import host_cpu_features, load_runtime

    clock = _Clock()
    driver = NvidiaDriver()
    clock.lap("driver")
    gpu = CudaDevice(driver, parse_ordinal(device))
    clock.lap("context")
    opened = open_bundle(bundle, verify="sizes")
    clock.lap("records")
    load_runtime(None)
    load_cuda_libraries()
    clock.lap("libraries")
    targets = opened.manifest.targets
    target = choose_cuda_target(targets, gpu.capability, gpu.name, host_cpu_features())
    gpu.load(opened.path, target.files)
    clock.lap("modules")
    gpu.close()
    return clock.laps


def load_times(bundle: Path, device: str, verify: Any) -> dict[str, float]:
    """From the call of ``runtime.load`` on: seconds until it returns, and until there is a token."""
    started = time.perf_counter()
    with runtime.load(bundle, device=device, verify=verify) as model:
        loaded = time.perf_counter()
        model.generate([list(range(1, PROMPT_TOKENS + 1))], max_new_tokens=1)
        first = time.perf_counter()
    return {"load": loaded - started, "first_token": first - started}


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


if __name__ == "__main__":
    main()
