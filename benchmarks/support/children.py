"""Systems under test in processes of their own: none of them disturbs another, or holds memory that another needs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.support.work import Work

ENGINE = "benchmarks.support.engine_run"
TRANSFORMERS = "benchmarks.support.transformers_run"
ACCELERATE = "benchmarks.peers.accelerate_run"


def run_child(module: str, target: Path, works: Sequence[Work], options: Sequence[str]) -> dict[str, Any]:
    """``python -m MODULE TARGET --work ...``: the JSON that it prints last.

    Raises:
        RuntimeError: it failed; the message is the end of what it said.
    """
    named = [option for work in works for option in ("--work", str(work))]
    command = [sys.executable, "-m", module, str(target), *named, *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def fastest(facts: dict[str, Any], work: Work, key: str) -> dict[str, Any] | None:
    """Of several runs of the same work, the one with the least ``key``."""
    runs = [run for run in facts["runs"] if run["work"] == str(work)]
    return min(runs, key=lambda run: float(run[key]), default=None)
