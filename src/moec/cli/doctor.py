"""``moec doctor``: what this machine has, and what of moec would run on it."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from moec.artifacts.sizes import human_bytes
from moec.cli.options import json_option
from moec.cli.output import print_json
from moec.cli.packages import COMPILE_PACKAGES, RUNTIME_PACKAGES, SERVER_PACKAGES
from moec.errors import MoecError

LINKERS = ("cc", "gcc", "clang", "ld", "ld.lld")


@click.command("doctor", short_help="Say what this machine has, and how fast it is.")
@json_option
def command(as_json: bool) -> None:
    """Say what this machine has: cores, memory and its measured speed, driver, and which commands would work.

    \b
    Example:
      moec doctor
    """
    facts = examine()
    if as_json:
        print_json(facts)
        return
    machine = facts["machine"]
    cores = machine["cpu_threads"]
    click.echo(f"processor      {facts['processor']}, {cores} core{'s' if cores > 1 else ''} usable")
    click.echo(
        f"instructions   {', '.join(facts['cpu_targets']) or 'below x86-64-v3: only --target cpu, made here'}"
    )
    click.echo(
        f"memory         {human_bytes(machine['host_memory_bytes'])}, "
        f"{human_bytes(facts['available_memory_bytes'])} available, read at {machine['host_bandwidth_gb_s']} GB/s"
    )
    click.echo(
        f"disk           read at {machine['disk_gb_s']} GB/s, {human_bytes(facts['free_disk_bytes'])} free here"
    )
    click.echo(f"NVIDIA driver  {facts['cuda_driver'] or 'none'}")
    for gpu in facts["gpus"]:
        click.echo(
            f"cuda:{gpu['ordinal']}         {gpu['name']}, {gpu['architecture']}, {human_bytes(gpu['memory_bytes'])} "
            f"({human_bytes(gpu['free_bytes'])} free), copies at {gpu['bandwidth_gb_s']:.0f} GB/s, "
            f"link {gpu['link_gb_s']:.1f} GB/s there, {gpu['back_link_gb_s']:.1f} back"
        )
    if len(facts["gpus"]) > 1:
        pairs = ", ".join(f"cuda:{first} and cuda:{second}" for first, second in facts["gpu_peers"])
        click.echo(f"between GPUs   {f'straight: {pairs}' if pairs else 'through host memory'}")
    if facts["gpu_problem"]:
        click.echo(f"GPUs           not usable: {facts['gpu_problem']}")
    click.echo(f"python         {facts['python']}")
    for what, missing in (
        ("runtime", facts["missing_for_runtime"]),
        ("server", facts["missing_for_server"]),
        ("compiler", facts["missing_for_compiler"]),
    ):
        click.echo(f"{what:<14} {'ready' if not missing else 'missing: ' + ', '.join(missing)}")


def examine() -> dict[str, Any]:
    """All facts as JSON values; takes a second or two, since speeds are measured."""
    from moec.artifacts.files.codec import to_json
    from moec.compiler.lowering.targets import CPU_LEVELS, required_flags
    from moec.runtime.devices.measure import cpu_model, gpu_peers, gpu_records, this_machine
    from moec.runtime.machine.libraries import host_cpu_features
    from moec.runtime.machine.limits import available_memory

    features = host_cpu_features()
    driver, gpus, peers, problem = cuda_driver(), [], [], ""
    if driver is not None:
        try:
            gpus = gpu_records()
            peers = gpu_peers()
        except MoecError as error:
            problem = f"{error.what} {error.do}"
    linked = any(map(shutil.which, LINKERS)) or importlib.util.find_spec("ziglang") is not None
    return {
        "processor": cpu_model(),
        "cpu_targets": [name for name in CPU_LEVELS if features.issuperset(required_flags(name))],
        "machine": to_json(this_machine(Path.cwd(), gpu=gpus[0] if gpus else None)),
        "available_memory_bytes": available_memory(),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "cuda_driver": driver,
        "gpus": [to_json(gpu) for gpu in gpus],
        "gpu_peers": peers,
        "gpu_problem": problem,
        "python": f"{platform.python_version()} at {sys.executable}",
        "missing_for_runtime": _missing(RUNTIME_PACKAGES),
        "missing_for_server": _missing(SERVER_PACKAGES),
        "missing_for_compiler": _missing(COMPILE_PACKAGES)
        + ([] if linked else ["a linker (pip install ziglang)"]),
    }


def cuda_driver() -> str | None:
    """The CUDA version that the NVIDIA driver supports, or ``None`` where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "found, but it does not answer"
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _missing(packages: tuple[str, ...]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]
