"""What a decoded token costs at the machine's bandwidths: bytes over speed, no constants but the handshake.

Times are in milliseconds; speeds in GB/s are 10^6 bytes a millisecond.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from moec.artifacts.footprint import LayerFootprint
    from moec.artifacts.machine import MachineRecord
    from moec.compiler.schedule.analysis import LayerAnalysis

BYTES_PER_MS = 1e6
"""At 1 GB/s."""


@dataclass(frozen=True)
class MissCost:
    """The cheapest way to deal with 0..K misses in a layer."""

    milliseconds: tuple[float, ...]
    """Entry m, never falling."""
    cpu_share: tuple[int, ...]
    """Entry m: how many of the m the CPU computes."""


@dataclass(frozen=True)
class TokenCost:
    """Means over the replayed tokens, for one MoE layer or several."""

    milliseconds: float
    misses: float
    cpu_misses: float
    file_misses: float


def miss_cost(machine: MachineRecord, layer: LayerFootprint) -> MissCost:
    """Split misses between the link and the CPU, which both draw on the bandwidth of host memory."""
    size = layer.expert_bytes / BYTES_PER_MS
    link = min(machine.link_gb_s, machine.gpu_bandwidth_gb_s)
    milliseconds, share = [0.0], [0]
    for misses in range(1, layer.top_k + 1):
        splits = []
        for by_cpu in range(1 if machine.unified_memory else misses + 1):
            by_link = (misses - by_cpu) * size / link
            handshake = machine.handshake_us / 1000 if by_cpu else 0.0
            on_cpu = by_cpu * size / machine.host_bandwidth_gb_s + handshake
            memory = misses * size / machine.host_bandwidth_gb_s
            splits.append((max(by_link, on_cpu, memory), by_cpu))
        best, by_cpu = min(splits)
        milliseconds.append(max(best, milliseconds[-1]))
        share.append(by_cpu)
    return MissCost(tuple(milliseconds), tuple(share))


def token_cost(
    machine: MachineRecord,
    facts: LayerFootprint,
    analysis: LayerAnalysis,
    cost: MissCost,
    slots: int,
    host_experts: int,
) -> TokenCost:
    """One MoE layer with a GPU: ``slots`` on it, the first ``host_experts`` of the order in host memory."""
    missed = analysis.distances > slots
    misses = missed.sum(axis=1)
    in_file = (missed & (analysis.ranks >= host_experts)).sum(axis=1)
    resident = _resident_time(machine, facts)
    times = np.maximum(np.array(cost.milliseconds)[misses], resident) + _file_times(machine, facts, in_file)
    by_cpu = np.array(cost.cpu_share)[misses]
    return TokenCost(*(float(np.mean(each)) for each in (times, misses, by_cpu, in_file)))


def cpu_token_cost(
    machine: MachineRecord, facts: LayerFootprint, analysis: LayerAnalysis, host_experts: int
) -> TokenCost:
    """One MoE layer on the CPU alone, where the policy moves experts between file and host memory."""
    in_file = (analysis.distances > host_experts).sum(axis=1)
    resident = facts.top_k * facts.expert_bytes / BYTES_PER_MS / machine.host_bandwidth_gb_s
    times = resident + _file_times(machine, facts, in_file)
    return TokenCost(
        float(np.mean(times)), float(np.mean(in_file)), float(np.mean(in_file)), float(np.mean(in_file))
    )


def slot_curve(
    machine: MachineRecord, facts: LayerFootprint, analysis: LayerAnalysis, cost: MissCost
) -> npt.NDArray[np.float64]:
    """Milliseconds of a MoE layer with 0..E slots, ``[E + 1]``, never rising; every expert in host memory."""
    tokens, top_k = analysis.distances.shape
    hits = np.zeros((tokens, facts.experts + 1), np.int64)
    np.add.at(hits, (np.arange(tokens)[:, None], analysis.distances), 1)
    misses = top_k - np.cumsum(hits, axis=1)
    times = np.maximum(np.array(cost.milliseconds)[misses], _resident_time(machine, facts))
    curve: npt.NDArray[np.float64] = np.minimum.accumulate(times.mean(axis=0))
    return curve


def dense_milliseconds(machine: MachineRecord, dense_bytes: int, *, on_device: bool) -> float:
    """Reading the dense weights of a token once."""
    speed = machine.gpu_bandwidth_gb_s if on_device else machine.host_bandwidth_gb_s
    return dense_bytes / BYTES_PER_MS / speed


def _resident_time(machine: MachineRecord, facts: LayerFootprint) -> float:
    return facts.top_k * facts.expert_bytes / BYTES_PER_MS / machine.gpu_bandwidth_gb_s


def _file_times(
    machine: MachineRecord, facts: LayerFootprint, in_file: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    return np.asarray(in_file, np.float64) * (facts.expert_bytes / BYTES_PER_MS / machine.disk_gb_s)
