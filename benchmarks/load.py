"""Loading a bundle onto a GPU, from the call to the first token, beside what the disk and the link allow.

python -m benchmarks.load dsv2.moec --device cuda:0
python -m benchmarks.load dsv2.moec --device cuda:0 --cold --verify sizes

Each measurement runs in a process of its own. The floor is the weights' bytes at the slower of two rates measured in
the same run: reading the files (the best of several thread counts, cold also of reading past the system's cache), and
copying pinned memory to the GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.support.common import print_rows, write_result
from moec.artifacts.files.reader import read_manifest, weight_names
from moec.runtime.devices.measure import gpu_record

AIM = 1.3
"""Most time to the first token over the floor."""
READ_THREADS = (1, 4, 8, 12, 16, 24)
COLD_THREADS = (4, 16)
"""Of reading a disk, through the system's cache and past it."""
SETTLING_SECONDS = 2.5
"""A bundle that was only just written is not noted as verified."""
LOADS = ("sizes", "once", "once", "full")
"""``verify`` of each load, in this order: the first ``once`` hashes, the second finds that noted."""


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--device", default="cuda:0", show_default=True)
@click.option(
    "--repeats", default=2, show_default=True, help="Of each load but those that hash; the best counts."
)
@click.option("--cold", is_flag=True, help="Let the system forget the files before each; a tmpfs cannot.")
@click.option(
    "--verify", "levels", type=click.Choice(sorted(set(LOADS))), multiple=True, help="Loads.  [default: all]"
)
@click.option("--read-gib", default=16, show_default=True, help="Read at most for one rate.")
def main(bundle: Path, device: str, repeats: int, cold: bool, levels: tuple[str, ...], read_gib: int) -> None:
    """Measure BUNDLE."""
    manifest = read_manifest(bundle.absolute())
    size = sum(manifest.files[name].size_bytes for name in weight_names(manifest))
    options = ["--device", device, *(["--cold"] if cold else [])]
    rates = ceilings(bundle, device, options, read_gib)
    rows = [{"what": what, "GB/s": rate, "ms": size / rate / 1e6} for what, rate in rates.items()]
    floor = size / min(max(rate for what, rate in rates.items() if "read" in what), rates["link"]) / 1e9
    rows += [
        {"what": f"start: {name}", "ms": seconds * 1e3}
        for name, seconds in measure("start", bundle, options).items()
    ]
    time.sleep(SETTLING_SECONDS)
    with tempfile.TemporaryDirectory() as cache:
        for number, verify in enumerate(LOADS):
            if levels and verify not in levels:
                continue
            own = repeats if LOADS[:number].count(verify) or verify == "sizes" else 1
            runs = [measure("load", bundle, [*options, "--verify", verify], cache) for _ in range(own)]
            best = min(runs, key=lambda run: run["first_token"])
            noted = " noted before" if LOADS[:number].count(verify) else ""
            rows.append(
                {
                    "what": f"load, verify={verify}{noted}",
                    "GB/s": size / best["load"] / 1e9,
                    "ms": best["load"] * 1e3,
                    "first token ms": best["first_token"] * 1e3,
                    "over floor": best["first_token"] / floor,
                    "aim": AIM,
                }
            )
    facts = {"weight_bytes": size, "floor_ms": floor * 1e3, "cold": cold}
    path = write_result(
        f"load-{device.partition(':')[0]}-{bundle.stem}{'-cold' if cold else ''}", rows, **facts
    )
    print_rows(rows)
    print(f"{facts}\n{path}")


def ceilings(bundle: Path, device: str, options: list[str], read_gib: int) -> dict[str, float]:
    """GB/s: reading by thread count, hashing with all cores, the link."""
    cold = "--cold" in options
    counts = COLD_THREADS if cold else READ_THREADS
    ways = {f"read, {threads} threads": ["--threads", str(threads)] for threads in counts}
    if cold:
        ways |= {f"{name}, past the cache": [*way, "--direct"] for name, way in ways.items()}
    most = ["--read-gib", str(read_gib)]
    rates = {name: measure("read", bundle, [*options, *most, *way])["gb_s"] for name, way in ways.items()}
    rates["sha256, all cores"] = measure("hash", bundle, options)["gb_s"]
    return rates | {"link": gpu_record(device).link_gb_s}


def measure(what: str, bundle: Path, options: list[str], cache: str | None = None) -> dict[str, float]:
    """The JSON that ``benchmarks.support.load_run`` prints.

    Raises:
        RuntimeError: it failed; the message is the end of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.support.load_run", what, str(bundle), *options]
    environment = {**os.environ, **({"MOEC_CACHE": cache} if cache else {})}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"load_run {what} failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
