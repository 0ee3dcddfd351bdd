"""What the cost model predicts for the budgets of a run of `benchmarks.offload`, over what was measured.

    python -m benchmarks.prediction BUNDLE RESULT.json

The machine is the one of the result, by the ceilings measured in the same run and moec's own constants; hits are those
that were measured, spread evenly over steps and layers, so the ratio is the cost model's alone. Aim: 0.85 to 1.15.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.support.common import print_rows, write_result
from moec.artifacts.footprint import footprint
from moec.artifacts.machine import MachineRecord
from moec.artifacts.model import ModelRecord
from moec.artifacts.records import read_record
from moec.artifacts.sharing import MAILBOX_US, TEAM_US, TeamSpeed
from moec.planning.cost import dense_milliseconds, miss_cost
from moec.planning.streaming import streamed_milliseconds
from moec.runtime.devices.cuda.measure import FED_LINK_EFFICIENCY, GPU_EFFICIENCY, LAYER_US, LINK_EFFICIENCY
from moec.runtime.devices.measure import HOST_EFFICIENCY

if TYPE_CHECKING:
    from moec.artifacts.footprint import Footprint

AIM = 0.15
STEP_TOKENS = 512


def machine_of(gpu: dict[str, Any], row: dict[str, Any], expert_bytes: int) -> MachineRecord:
    """The machine of a row; without threads, one with no CPU to help."""
    threads = int(row.get("threads") or 0)
    host = row.get("read GB/s") or 1e6
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


def predicted(machine: MachineRecord, facts: Footprint, row: dict[str, Any]) -> float:
    """Milliseconds of a row: a decoding step, or a step of many tokens."""
    if row["work"] != "decode":
        share = float(row["slots"].rstrip("%")) / 100
        slots = [round(share * layer.experts) for layer in facts.layers]
        return streamed_milliseconds(machine, facts, slots, STEP_TOKENS)
    chosen = sum(layer.top_k * layer.expert_bytes for layer in facts.layers)
    missing = float(row["missed MB"]) * 1e6 / chosen
    routed = 0.0
    for layer in facts.layers:
        costs = miss_cost(machine, layer).milliseconds
        routed += float(np.interp(missing * layer.top_k, range(len(costs)), costs))
    return dense_milliseconds(machine, facts, on_device=True) + routed


def main() -> None:
    """Print and write the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("result", type=Path)
    options = parser.parse_args()
    facts = footprint(read_record(ModelRecord, "model", options.bundle / "model.json"))
    result = json.loads(options.result.read_bytes())
    rows, expert_bytes = [], facts.layers[0].expert_bytes
    for row in result["rows"]:
        ours = predicted(machine_of(result["gpu"], row, expert_bytes), facts, row)
        kept = {key: row[key] for key in ("work", "slots", "routing", "threads", "fed") if key in row}
        rows.append(kept | {"measured ms": row["ms"], "predicted ms": ours, "ratio": ours / row["ms"]})
    print_rows(rows)
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    name = options.result.stem.replace("offload", "prediction", 1)
    write_result(name, rows, of=options.result.name, aim=AIM, worst=worst["ratio"])


if __name__ == "__main__":
    main()
