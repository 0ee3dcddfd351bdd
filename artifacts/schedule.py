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

PolicyName: TypeAlias = Literal["lru", "lfru", "lrfu", "lfu", "static"]
Admission: TypeAlias = Literal["always", "better"]
PrefetchSource: TypeAlias = Literal["none", "router", "transitions", "requests"]
"""``router``: the next layer's router applied to this layer's hidden state. ``transitions``: the profile's table.
``requests``: the traced sequence whose use of experts so far is most like this one's."""


@dataclass(frozen=True)
class LayerProfile:
    """How the experts of one MoE layer are used."""

    layer: LayerId
    order: tuple[int, ...]
    """All experts of the layer, most used first."""
    use_share: tuple[float, ...]
    """In the same order: the share of tokens that chose the expert; they add up to the layer's top-k."""
    slot_value: tuple[float, ...]
    """Chosen experts of a token that the first, second, … slot of the layer turns into hits under the policy for a
    GPU; never rising. Slots go where a byte has the most value: `moec.artifacts.layout.hosting.device_slots`."""
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

    The one with the least score leaves; of equal scores the one with the higher number. Experts that the step at work
    chose never leave: a missed one that finds only such is used without taking a slot.
    `moec.planning.policies` has the arithmetic, in integers.

    | name | score |
    |---|---|
    | ``lru`` | when it was last chosen |
    | ``lfru`` | ``uses / (age + 1)``: uses counts the tokens that chose it, age those since the last of them |
    | ``lrfu`` | uses that halve every ``half_life_tokens``, and beside them the prior, which does not fade |
    | ``lfu`` | the same with a half-life of thousands of tokens |
    | ``static`` | the prior alone: the most used experts of the profile stay |
    """

    name: PolicyName
    prior_tokens: int
    """The prior is so many tokens' uses by the profile: ``prior_tokens * use_share``. For ``lru`` it is 0; ``lfru``
    begins with it as uses."""
    half_life_tokens: int
    """A power of two; 0 where uses do not fade."""
    admission: Admission
    """``always``: every missed expert takes a slot where it can. ``better``: only in place of one with a lesser
    score than its own."""


DEFAULT_POLICY = Policy("lrfu", 4, 16, "always")
"""Where nothing was traced that another could be chosen by."""


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
    streamed_from_tokens: int
    """Steps of at least so many tokens are streamed, smaller ones run from the slots and read what they miss; by the
    cost model. 0: on the CPU alone. Above ``step_tokens``: no step is streamed."""
    milliseconds_per_step: float
    """Predicted time of a step of ``step_tokens``; 0 on the CPU alone."""


@dataclass(frozen=True)
class PrefetchFigures:
    """What one way to guess the next layer's experts came to on the traces."""

    source: PrefetchSource
    recall: float
    """Share of the chosen experts that were among the guessed ones; as many are guessed as are chosen."""
    exact_match: float
    """Share of tokens and layers whose chosen experts were all among the guessed ones."""
    fetched_bytes_per_token: float
    """Guessed experts that had no slot, as many as the bound lets through."""
    wasted_bytes_per_token: float
    """Of these, bytes of experts that the token did not choose."""
    gain_milliseconds: float
    """Of a token, by the cost model; below 0 where it costs more than it saves."""


@dataclass(frozen=True)
class PrefetchPlan:
    """Experts fetched before their layer's router has spoken, while the link would idle."""

    source: PrefetchSource
    """Which guess is followed: the candidate that gains the most; ``none`` where none gains."""
    bytes_per_layer: int
    """Most bytes to fetch ahead for one layer: what the link moves while nothing else wants it; whole experts
    without a GPU, pieces of 16 KiB with one."""
    candidates: tuple[PrefetchFigures, ...]
    """Those that could be evaluated on the traces."""


NO_PREFETCH = PrefetchPlan("none", 0, ())


@dataclass(frozen=True)
class PolicyFigures:
    """What a policy would hit with the schedule's slots, on the traces."""

    policy: Policy
    hit_rate: float


@dataclass(frozen=True)
class BudgetPoint:
    """The same machine and traces with another number of slots."""

    slots: int
    """In all MoE layers together; on the CPU alone, experts in host memory."""
    expert_bytes: int
    """What they take."""
    hit_rate: float
    optimal_hit_rate: float
    milliseconds_per_token: float


@dataclass(frozen=True)
class Prediction:
    """What the cost model expects of decode at batch 1, from the machine's figures."""

    hit_rate: float
    """Share of chosen experts found in a slot (on the CPU alone: in host memory)."""
    optimal_hit_rate: float
    """The same under Belady's optimum, which needs the future."""
    milliseconds_per_token: float
    resident_milliseconds: float
    """Part of it that a model whose experts all have a slot takes."""
    dense_bytes_per_token: int
    hit_bytes_per_token: float
    link_bytes_per_token: float
    """Missed experts read through the link."""
    cpu_bytes_per_token: float
    """Missed experts computed by the CPU in place."""
    file_bytes_per_token: float
    """Part of the missed bytes that is not in host memory and comes from the file."""
    policies: tuple[PolicyFigures, ...]
    """What the schedule's policy was chosen from, the best first."""
    curve: tuple[BudgetPoint, ...]
    """From no slots to all."""


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
    prefetch: PrefetchPlan
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
