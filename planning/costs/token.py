"""What a decoded token costs at the machine's speeds: bytes over speed, and the machine's measured times beside them.

Times are in milliseconds; speeds in GB/s are 10^6 bytes a millisecond.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.sharing import ShareSpeeds, cpu_shares

if TYPE_CHECKING:
    import numpy.typing as npt

    from moec.artifacts.layout.footprint import Footprint, LayerFootprint
    from moec.artifacts.machine import MachineRecord
    from moec.planning.routing.replay import LayerReplay

BYTES_PER_MS = 1e6
"""At 1 GB/s."""
QUANTIZED_LAYER_US = 10.0
"""Of a GPU's layer with quantized experts, beside its bytes and `MachineRecord.layer_us`: what their codes take to be
widened. H200: DeepSeek-V2-Lite's and Qwen3-30B-A3B's shapes in int4, 1.50 ms for 27 layers and 2.25 for 48."""
SLOTS_US = 7.5
"""Of a layer that has slots for a part of its experts: finding them, and looking for what is missing. H200,
Qwen3-30B-A3B in int4, where nothing is missing: 2.64 ms instead of 2.25."""
HELP_US = 3.5
"""Of such a layer beside threads of the CPU, where they have nothing to do: 2.81 ms instead of 2.64."""


@dataclass(frozen=True)
class MissCost:
    """A MoE layer's cheapest way to run a token with 0..K misses."""

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
    """Split misses between the link and the CPU by the rule that the runtime has.

    The GPU fetches its share of the misses through the link into slots, then reads all of its experts from there; the
    CPU computes its share meanwhile. Both draw on the bandwidth of host memory.
    """
    size = layer.expert_bytes / BYTES_PER_MS
    link = min(machine.link_gb_s * machine.link_efficiency, machine.gpu_bandwidth_gb_s)
    gpu = machine.gpu_bandwidth_gb_s * machine.gpu_efficiency
    cpu = machine.host_bandwidth_gb_s * machine.host_efficiency
    speeds = ShareSpeeds(1000 * size / link, (0.0, 1000 * size / cpu), machine.handshake_us)
    shares = cpu_shares(speeds, layer.top_k)
    share = (0,) * len(shares) if machine.unified_memory else shares
    milliseconds = [layer.top_k * size / gpu]
    for misses, by_cpu in list(enumerate(share))[1:]:
        on_gpu = (misses - by_cpu) * size / link + (layer.top_k - by_cpu) * size / gpu
        memory = misses * size / machine.host_bandwidth_gb_s
        slowest = max(on_gpu, speeds.on_cpu(by_cpu) / 1000, memory)
        milliseconds.append(max(slowest, milliseconds[-1]))
    return MissCost(tuple(milliseconds), share)


def cpu_has_share(machine: MachineRecord, facts: Footprint) -> bool:
    """Whether the CPU computes any missing expert of a token in a model."""
    return any(any(miss_cost(machine, layer).cpu_share) for layer in facts.layers)


def token_cost(
    machine: MachineRecord,
    facts: LayerFootprint,
    replay: LayerReplay,
    cost: MissCost,
    slots: int,
    host_experts: int,
) -> TokenCost:
    """One MoE layer with a GPU: ``slots`` on it, the first ``host_experts`` of the order in host memory."""
    missed = replay.distances > slots
    misses = missed.sum(axis=1)
    in_file = (missed & (replay.ranks >= host_experts)).sum(axis=1)
    times = np.array(cost.milliseconds)[misses] + _file_times(machine, facts, in_file)
    if slots < facts.experts:
        times += cached_milliseconds(cost)
    by_cpu = np.array(cost.cpu_share)[misses]
    return TokenCost(*(float(np.mean(each)) for each in (times, misses, by_cpu, in_file)))


def cached_milliseconds(cost: MissCost) -> float:
    """What a layer that has slots for a part of its experts takes for that alone."""
    return (SLOTS_US + (HELP_US if any(cost.cpu_share) else 0.0)) / 1000


def cpu_token_cost(
    machine: MachineRecord, facts: LayerFootprint, replay: LayerReplay, host_experts: int
) -> TokenCost:
    """One MoE layer on the CPU alone, where the policy moves experts between file and host memory."""
    in_file = (replay.distances > host_experts).sum(axis=1)
    speed = machine.host_bandwidth_gb_s * machine.host_efficiency
    resident = facts.top_k * facts.expert_bytes / BYTES_PER_MS / speed
    times = resident + _file_times(machine, facts, in_file)
    missed = float(np.mean(in_file))
    return TokenCost(float(np.mean(times)), missed, missed, missed)


def dense_milliseconds(machine: MachineRecord, facts: Footprint, *, on_device: bool) -> float:
    """Reading a token's dense weights once, its states to and fro; on a GPU also what each layer costs beside that."""
    size = (facts.dense_bytes_per_token + 2 * facts.sequence_bytes) / BYTES_PER_MS
    if not on_device:
        speed = machine.host_bandwidth_gb_s * machine.host_efficiency
        return size / speed
    speed = machine.gpu_bandwidth_gb_s * machine.gpu_efficiency
    layers = max(facts.attention_steps, len(facts.layers))
    quantized = sum(layer.quantized for layer in facts.layers)
    return size / speed + (layers * machine.layer_us + quantized * QUANTIZED_LAYER_US) / 1000


def idle_milliseconds(machine: MachineRecord, facts: Footprint, *, on_device: bool) -> float:
    """Of a MoE layer: the time in which there is nothing to bring, since its router has not spoken."""
    return dense_milliseconds(machine, facts, on_device=on_device) / max(1, len(facts.layers))


def idle_bytes(machine: MachineRecord, facts: Footprint) -> int:
    """What crosses the link in `idle_milliseconds` on a GPU."""
    speed = machine.link_gb_s * machine.link_efficiency
    return int(idle_milliseconds(machine, facts, on_device=True) * speed * BYTES_PER_MS)


def _file_times(
    machine: MachineRecord, facts: LayerFootprint, in_file: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    return np.asarray(in_file, np.float64) * (facts.expert_bytes / BYTES_PER_MS / machine.disk_gb_s)
