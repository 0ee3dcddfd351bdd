"""What every benchmark shares: where results go, and what is written beside them."""

from __future__ import annotations

import datetime as dt
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from moec.runtime.machine import total_memory
from moec.runtime.measure import cpu_model
from moec.runtime.threads import default_threads

RESULTS = Path(__file__).with_name("results")


def write_result(name: str, rows: Any, **facts: Any) -> Path:
    """Write ``results/<name>.json`` with the machine, the date and the command beside the rows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "benchmark": name,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": {
            "processor": cpu_model(),
            "cores": default_threads(),
            "memory_bytes": total_memory(),
        },
        **facts,
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys as a table."""
    header = list(rows[0])
    cells = [[_cell(row[key]) for key in header] for row in rows]
    widths = [max(len(key), *(len(row[i]) for row in cells)) for i, key in enumerate(header)]
    for row in [header, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
