"""``schedule.json``: what to keep where, decided ahead of time for each machine and budget.

The routing profile is common to all schedules: it ranks the experts of each layer. A schedule then only says
how far down that ranking each tier reaches, which also makes a larger budget keep everything that a smaller
one keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from moec.artifacts.ids import LayerId
from moec.artifacts.machine import MachineRecord

if TYPE_CHECKING:
    from collections.abc import Iterable

PolicyName: TypeAlias = Literal["lru", "lfru"]

DEFAULT_PRIOR_TOKENS = 32
"""Of ``lfru``."""


@dataclass(frozen=True)
class LayerProfile:
    """How the experts of one MoE layer are used."""

    layer: LayerId
    order: tuple[int, ...]
    """All experts of the layer, most used first."""
    use_share: tuple[float, ...]
    """In the same order: the share of tokens that chose the expert; they add up to the layer's top-k."""
    transitions: tuple[tuple[int, ...], ...]
    """Row e: the experts of the next MoE layer most often chosen together with expert e of this one,
    likeliest first; to prefetch. Empty in the last layer and where nothing was traced."""


@dataclass(frozen=True)
class RoutingProfile:
    """What the routing traces say, and on how much they rest."""

    provenance: Literal["traced", "uniform"]
    """``uniform``: nothing was traced, every expert is taken to be used alike."""
    tokens: int
    sequences: int
    layers: tuple[LayerProfile, ...]


@dataclass(frozen=True)
class Budgets:
    """Hard limits on what the process allocates on each tier, and the work they must hold."""

    device_memory_bytes: int
    """0: run on the CPU alone."""
    host_memory_bytes: int
    context_tokens: int
    """Cached tokens of all sequences together."""
    step_tokens: int
    """Tokens in the largest step (prefill is cut into steps of this size)."""


@dataclass(frozen=True)
class TierBytes:
    """What one tier holds; the sum is within its budget."""

    dense_weights: int
    kv_cache: int
    activations: int
    slot_tables: int
    stream_buffers: int
    """Room for experts on their way through; on the CPU alone, for those that it drops again after use."""
    experts: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        fixed = self.dense_weights + self.kv_cache + self.activations + self.slot_tables
        return fixed + self.stream_buffers + self.experts


@dataclass(frozen=True)
class Policy:
    """Which expert leaves its slot for a missed one; on the CPU alone, its place in host memory.

    ``lfru``: the one with the least ``uses / (age + 1)``, where uses counts the tokens that chose the expert
    (whether or not it had a slot) and age the tokens since the last of them. ``lru``: the one used longest
    ago. Experts that the token at work chose never leave: a missed one that finds only such is used without
    taking a slot. Ties: the one later in the profile's order leaves.
    """

    name: PolicyName
    prior_tokens: int
    """Uses start at ``prior_tokens * use_share`` of the profile, ages at 0. For ``lru`` it is 0."""


@dataclass(frozen=True)
class LayerSchedule:
    """One MoE layer. Both counts are prefixes of the layer's order in the profile."""

    layer: LayerId
    slots: int
    """Expert slots on the device."""
    seeds: int
    """Slots filled at load, with the most used experts."""
    host_experts: int
    """Experts kept in host memory; the others are read from the file. With a GPU these are pinned and always the
    same; on the CPU alone they are those to begin with, and the policy says who leaves for a missed one."""
    cpu_share: tuple[int, ...]
    """Entry m: of m missed experts the CPU computes so many while the GPU reads the others. Length top-k +
    1."""


@dataclass(frozen=True)
class PrefillPlan:
    """Prefill streams the experts that have no slot, layer by layer, through equal buffers on the device."""

    order: tuple[LayerId, ...]
    buffers: int
    buffer_bytes: int
    """Of one buffer. Both are 0 on the CPU alone, which reads experts in place."""


@dataclass(frozen=True)
class Prediction:
    """What the cost model expects of decode at batch 1, from the machine's figures; a bandwidth floor."""

    hit_rate: float
    """Share of chosen experts found in a slot (on the CPU alone: in host memory)."""
    milliseconds_per_token: float
    dense_bytes_per_token: int
    hit_bytes_per_token: float
    link_bytes_per_token: float
    """Missed experts read through the link."""
    cpu_bytes_per_token: float
    """Missed experts computed by the CPU in place."""
    file_bytes_per_token: float
    """Part of the missed bytes that is not in host memory and comes from the file."""


@dataclass(frozen=True)
class Schedule:
    """Everything decided for one machine and one pair of budgets."""

    machine: MachineRecord
    budgets: Budgets
    device: TierBytes
    host: TierBytes
    policy: Policy
    layers: tuple[LayerSchedule, ...]
    prefill: PrefillPlan
    prediction: Prediction


@dataclass(frozen=True)
class ScheduleRecord:
    """The whole of ``schedule.json``."""

    profile: RoutingProfile
    schedules: tuple[Schedule, ...]


def best_schedule(
    schedules: Iterable[Schedule], device_memory_bytes: int, host_memory_bytes: int
) -> Schedule | None:
    """The fastest schedule that needs no more than these budgets; ``None`` where none does.

    With ``device_memory_bytes`` 0 only schedules for the CPU alone are considered, otherwise only those for a
    GPU.
    """
    fitting = [
        schedule
        for schedule in schedules
        if schedule.device.total <= device_memory_bytes
        and schedule.host.total <= host_memory_bytes
        and (schedule.budgets.device_memory_bytes == 0) == (device_memory_bytes == 0)
    ]
    return min(fitting, key=lambda schedule: schedule.prediction.milliseconds_per_token, default=None)
