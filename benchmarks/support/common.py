"""What every benchmark shares: where results go, and what is written beside them."""

from __future__ import annotations

import datetime as dt
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from moec.runtime.devices.measure import cpu_model
from moec.runtime.machine.limits import total_memory
from moec.runtime.machine.threads import default_threads

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parents[1] / "results")
"""``BENCHMARK_RESULTS`` in the environment says another folder."""

GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory": "memory.total",
    "link": "pcie.link.gen.max",
    "lanes": "pcie.link.width.max",
}
"""Our name of a fact to nvidia-smi's."""


def write_result(name: str, rows: Any, **facts: Any) -> Path:
    """Write ``<name>.json`` with the machine, the date and the command beside the rows."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "benchmark": name,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", _module(Path(sys.argv[0])), *sys.argv[1:]]),
        "machine": machine(),
        **facts,
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def known_rows(name: str, **facts: Any) -> list[dict[str, Any]]:
    """Rows of the results that are there; none where these say other ``facts`` of themselves."""
    path = RESULTS / f"{name}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record["rows"] if record and facts.items() <= record.items() else []


def _module(program: Path) -> str:
    name = program.parent.name if program.stem == "__main__" else program.stem
    return f"benchmarks.{name}"


def machine() -> dict[str, Any]:
    """This machine's processor, memory, and GPUs if it has any."""
    facts: dict[str, Any] = {
        "processor": cpu_model(),
        "cores": default_threads(),
        "memory_bytes": total_memory(),
    }
    found = gpus()
    return facts | ({"gpus": found} if found else {})


def gpus() -> list[dict[str, str]]:
    """Name, driver, memory and link of each GPU, as nvidia-smi says; none where that is not there or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS.values())}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [dict(zip(GPU_FIELDS, line.split(", "), strict=True)) for line in lines]


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table; a row may lack some of the columns."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key)) for key in header] for row in rows]
    widths = [max(len(key), *(len(row[i]) for row in cells)) for i, key in enumerate(header)]
    for row in [header, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
