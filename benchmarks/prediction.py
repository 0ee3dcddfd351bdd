"""What the cost model predicts for the rows of `benchmarks.offload` or `benchmarks.prefill`, over what was measured.

    python -m benchmarks.prediction BUNDLE offload-RESULT.json
    python -m benchmarks.prediction BUNDLE prefill-RESULT.json --gpu-of offload-RESULT.json

The machine is the one of the result, by the ceilings measured in the same run (with --gpu-of, in another result's) and
moec's own constants; hits are those that were measured, spread evenly over steps and layers, so the ratio is the cost
model's alone. Aim: 0.85 to 1.15.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.support.common import print_rows, write_result
from moec.artifacts.files.records import read_record
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.machine import MachineRecord
from moec.artifacts.model import ModelRecord
from moec.artifacts.sharing import MAILBOX_US, TEAM_US, TeamSpeed
from moec.planning.costs.streaming import StepTimes
from moec.planning.costs.token import cached_milliseconds, dense_milliseconds, miss_cost
from moec.planning.costs.work import step_work
from moec.runtime.devices.cuda.measure import FED_LINK_EFFICIENCY, GPU_EFFICIENCY, LAYER_US, LINK_EFFICIENCY
from moec.runtime.devices.measure import HOST_EFFICIENCY

if TYPE_CHECKING:
    from moec.artifacts.layout.footprint import Footprint
    from moec.planning.costs.work import StepWork

AIM = 0.15
OURS, DECODE = "moec", "decode"


def threads_of(row: dict[str, Any]) -> int:
    """Of the CPU's that compute experts; prompts that had everything resident name none."""
    return int(row.get("threads") or 0)


def machine_of(gpu: dict[str, Any], row: dict[str, Any], expert_bytes: int, host: float) -> MachineRecord:
    """The machine of a row; without threads, one with no CPU to help. ``host``: GB/s at which they read memory."""
    threads = threads_of(row)
    team = TeamSpeed.of(row.get("CPU us") or (), expert_bytes)
    return MachineRecord(
        name=gpu["name"],
        gpu_name=gpu["name"],
        gpu_memory_bytes=gpu["memory_bytes"],
        gpu_bandwidth_gb_s=gpu["bandwidth_gb_s"],
        gpu_efficiency=GPU_EFFICIENCY,
        gpu_tflops=gpu.get("tflops", 0.0),
        layer_us=LAYER_US,
        link_gb_s=gpu["link_gb_s"],
        link_efficiency=FED_LINK_EFFICIENCY if row.get("fed") else LINK_EFFICIENCY,
        unified_memory=False,
        host_memory_bytes=1 << 40,
        host_bandwidth_gb_s=host,
        host_efficiency=HOST_EFFICIENCY if team is None else team.gb_s / host,
        cpu_threads=max(1, threads),
        disk_gb_s=1.0,
        handshake_us=MAILBOX_US + (TEAM_US if team is None else team.start_us) if threads else 1e9,
        source="benchmarks.offload",
    )


@dataclass(frozen=True)
class Predictor:
    """The cost model for one bundle and the GPU of a result."""

    facts: Footprint
    work: StepWork
    gpu: dict[str, Any]
    host: dict[int, float]
    """By threads: the best of the whole result, whose rows have the best until then."""

    def milliseconds(self, row: dict[str, Any]) -> float:
        """Of a row: a decoding step, or a step of many tokens."""
        host = self.host.get(threads_of(row)) or 1e6
        machine = machine_of(self.gpu, row, self.facts.layers[0].expert_bytes, host)
        if row["work"] != DECODE:
            share = float(row["slots"].rstrip("%")) / 100
            slots = [round(share * layer.experts) for layer in self.facts.layers]
            return StepTimes(machine, self.facts, self.work).streamed(slots, int(row["work"].split()[0]))
        chosen = sum(layer.top_k * layer.expert_bytes for layer in self.facts.layers)
        missing = float(row["missed MB"]) * 1e6 / chosen
        routed = 0.0
        for layer in self.facts.layers:
            cost = miss_cost(machine, layer)
            times = cost.milliseconds
            routed += float(np.interp(missing * layer.top_k, range(len(times)), times))
            if row["slots"] != "100%":
                routed += cached_milliseconds(cost)
        return dense_milliseconds(machine, self.facts, on_device=True) + routed


def measured_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows as `benchmarks.offload` writes them; prompts of `benchmarks.prefill` had everything resident."""
    rows = [row for row in result["rows"] if row.get("system", OURS) == OURS]
    return [
        {"work": f"{row['tokens']} tokens", "slots": "100%"} | row if "tokens" in row else row for row in rows
    ]


def best_readings(rows: list[dict[str, Any]]) -> dict[int, float]:
    """GB/s of host memory by the threads that read it."""
    found: dict[int, float] = {}
    for row in rows:
        threads, read = threads_of(row), float(row.get("read GB/s") or 0.0)
        found[threads] = max(found.get(threads, 0.0), read)
    return found


def main() -> None:
    """Print and write the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--gpu-of", type=Path, help="another result, where this one says nothing of the GPU")
    options = parser.parse_args()
    model = read_record(ModelRecord, "model", options.bundle / "model.json")
    result = json.loads(options.result.read_bytes())
    gpu = json.loads((options.gpu_of or options.result).read_bytes())["gpu"]
    measured = measured_rows(result)
    predictor = Predictor(footprint(model), step_work(model), gpu, best_readings(measured))
    rows = []
    for row in measured:
        ours = predictor.milliseconds(row)
        kept = {key: row[key] for key in ("work", "slots", "routing", "threads", "fed") if key in row}
        rows.append(kept | {"measured ms": row["ms"], "predicted ms": ours, "ratio": ours / row["ms"]})
    print_rows(rows)
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    name = f"prediction-{options.result.stem.removeprefix('offload-')}"
    write_result(name, rows, of=options.result.name, aim=AIM, worst=worst["ratio"])


if __name__ == "__main__":
    main()
