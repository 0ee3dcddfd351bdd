"""Compile real, full-size configs without their weights: seconds, peak memory, distinct segments.

Seconds are those of the clock, and those of the processors, which say more on a machine that does other things too.

python -m benchmarks.compile_large deepseek_v3 --target cpu
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import transformers

from benchmarks.support.common import print_rows, write_result

PUBLISHED = Path(__file__).with_name("configs")
"""``config.json`` of models as they were published, by model type."""

CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "qwen3_moe": {},
    "mixtral": {},
    "gpt_oss": {},
    "deepseek_v2": {},
    "grok-1": {},
    "arctic": {},
    "switch_transformers": {},
    "nllb-moe": {},
}
"""Model types as published (see ``PUBLISHED``), or else by their default config in transformers with these fields."""


def write_config(name: str, folder: Path) -> None:
    """Write ``config.json`` alone: a checkpoint without weights."""
    published = PUBLISHED / f"{name}.json"
    if published.is_file():
        shutil.copyfile(published, folder / "config.json")
        return
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"dtype": "bfloat16"}))


def compile_modules(
    checkpoint: Path, output: Path, target: str, max_context: int | None = None
) -> dict[str, Any]:
    """``moec compile --modules-only`` in a process of its own; its seconds, peak memory and what it made."""
    code = (
        "import re, sys; from pathlib import Path; from moec.__main__ import run\n"
        "code = run(sys.argv[1:])\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print('PEAK', re.search(r'VmHWM:\\s+(\\d+)', status)[1]); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "compile", str(checkpoint), "-o", str(output), "--modules-only"]
    command += ["--max-context", str(max_context)] if max_context else []
    start, before = time.perf_counter(), _children_seconds()
    done = subprocess.run([*command, "--target", target], check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    peak_kib = int(done.stdout.split("PEAK")[1])
    model = json.loads((output / "model.json").read_text())
    return {
        "target": target,
        "seconds": round(seconds, 1),
        "CPU seconds": round(_children_seconds() - before, 1),
        "peak GiB": round(peak_kib / 2**20, 2),
        "steps": len(model["steps"]) + len(model["encoder"]),
        "distinct segments": len(model["functions"]),
    }


def _children_seconds() -> float:
    """Of all processors, for this process's children and theirs, once they have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(CONFIGS)), required=True)
@click.option("--target", default="cpu", show_default=True)
def main(names: tuple[str, ...], target: str) -> None:
    """Compile NAMES without weights, one after the other."""
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder, name)
            checkpoint.mkdir()
            write_config(name, checkpoint)
            rows.append({"model": name, **compile_modules(checkpoint, Path(folder, "modules"), target)})
    path = write_result(f"compile_large-{target}", rows)
    print_rows(rows)
    print(path)


if __name__ == "__main__":
    main()
