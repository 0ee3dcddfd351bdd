"""Experts that do not all fit the GPU, divided among its slots, host memory and the file. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.layout.hosting import device_slots, host_order, take_prefix
from moec.artifacts.sizes import exact_bytes, human_bytes
from moec.artifacts.words.slots import MOST_ENTRIES, MOST_SHARED, state_words
from moec.errors import BudgetError
from moec.runtime.device import padded_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.layout.footprint import LayerFootprint
    from moec.artifacts.schedule import Policy, RoutingProfile


@dataclass(frozen=True)
class LayerSlots:
    """One MoE layer. E experts."""

    experts: int
    top_k: int
    stride_bytes: int
    """Of one expert in memory; what of it are weights is a little less."""
    second_bytes: int
    """Where in an expert that begins which only the second of its products reads."""
    slots: int
    """Experts on the GPU; at first the most used ones."""
    hosted: int
    """Experts in host memory, always the same: the most used ones. The others are in the file."""
    order: tuple[int, ...]
    """All experts, the most used first."""
    use_shares: tuple[float, ...]
    """By expert: the share of traced tokens that chose it."""
    cpu_share: tuple[int, ...]
    """Entry m: of m missing experts the CPU computes so many."""


@dataclass(frozen=True)
class SlotPlan:
    """What the GPU and the host keep of all routed experts."""

    layers: tuple[LayerSlots, ...]
    policy: Policy
    stage_bytes: int
    """Of the memory through which missing experts pass that get no slot, and through which large steps stream."""
    file_places: int
    """Experts for which there is pinned memory on their way from the file; 0: all experts are in host memory."""
    streamed_from: int | None
    """Tokens from which on a step is streamed where it need not be; ``None``: never."""

    @property
    def most_entries(self) -> int:
        """Choices up to which a step runs from the slots."""
        enough = self.file_places >= max((layer.experts - layer.hosted for layer in self.layers), default=0)
        return MOST_ENTRIES if enough else min(MOST_ENTRIES, self.file_places)

    @property
    def streams(self) -> bool:
        """Whether any step can be streamed: what is only in the file has to find room on the stage."""
        return all(
            layer.experts - layer.hosted <= self.stage_places(number)
            for number, layer in enumerate(self.layers)
        )

    @property
    def slot_bytes(self) -> int:
        """Of all slots."""
        return sum(layer.slots * layer.stride_bytes for layer in self.layers)

    @property
    def host_bytes(self) -> int:
        """Of all experts in host memory."""
        return sum(layer.hosted * layer.stride_bytes for layer in self.layers)

    def is_streamed(self, layer: int, tokens: int) -> bool:
        """Whether a step of so many tokens runs ``layer`` as a stream."""
        return tokens >= self.streamed_tokens(layer)

    def streamed_tokens(self, layer: int) -> int:
        """The fewest tokens of a step that runs ``layer`` as a stream."""
        needed = self.most_entries // self.layers[layer].top_k + 1
        return min(needed, self.streamed_from) if self.streamed_from is not None and self.streams else needed

    def stage_places(self, layer: int) -> int:
        """How many experts of ``layer`` the stage holds."""
        return self.stage_bytes // self.layers[layer].stride_bytes


def plan_slots(
    layers: Sequence[LayerFootprint],
    profile: RoutingProfile,
    policy: Policy,
    streamed_from: int | None,
    *,
    device_bytes: int,
    host_bytes: int,
    max_batch: int,
) -> SlotPlan:
    """Divide what is left of two budgets.

    The stage comes first: without room for all experts of the largest layer large steps are slow. Slots go where they
    are worth the most by the planner's rule, host memory to the most used experts.

    Args:
        layers: what the layers take.
        profile: how often each expert is used, layer by layer.
        policy: who leaves.
        streamed_from: tokens from which on a step is streamed, by the schedule; ``None``: when it has to be.
        device_bytes: room for slots and stage.
        host_bytes: room for experts in host memory.
        max_batch: sequences at once, whose experts have to find room on their way from the file.

    Raises:
        BudgetError: ``host_bytes`` is too little for that.
    """
    whole = max((layer.experts * layer.stride_bytes for layer in layers), default=0)
    largest = max((layer.stride_bytes for layer in layers), default=1)
    stage = min(whole, device_bytes // largest * largest)
    ranked = profile.layers
    slots = device_slots(layers, [each.slot_value for each in ranked], device_bytes - stage)
    order = host_order([each.use_share for each in ranked])
    hosted, places = _hosted(layers, order, host_bytes, max_batch)
    planned: list[LayerSlots] = []
    for layer, each, own, kept in zip(layers, ranked, slots, hosted, strict=True):
        shares = [0.0] * layer.experts
        for expert, share in zip(each.order, each.use_share, strict=True):
            shares[expert] = share
        by_cpu = (0,) * (MOST_SHARED + 1)
        facts = layer.experts, layer.top_k, layer.stride_bytes, layer.second_bytes
        planned.append(LayerSlots(*facts, own, kept, each.order, tuple(shares), by_cpu))
    return SlotPlan(tuple(planned), policy, stage, places, streamed_from)


def _hosted(
    layers: Sequence[LayerFootprint], order: Sequence[int], room: int, max_batch: int
) -> tuple[list[int], int]:
    """Experts of each layer in host memory, and places for those that are not."""
    if sum(layer.experts * layer.stride_bytes for layer in layers) <= room:
        return [layer.experts for layer in layers], 0
    places = max(min(layer.experts, (max_batch + 1) * layer.top_k) for layer in layers)
    passing = places * max(layer.stride_bytes for layer in layers)
    if passing > room:
        raise BudgetError(
            f"host_memory is {exact_bytes(passing - room)} too small for experts on their way from the file.",
            f"{human_bytes(room)} are left for experts, and a step of {max_batch} sequences may want {places} at once.",
            "Raise host_memory, or lower max_batch.",
        )
    return take_prefix(order, layers, room - passing), places


def state_bytes(layers: Sequence[LayerFootprint]) -> int:
    """Device memory of `moec.runtime.devices.cuda.offload.states.LayerStates`, whatever the slots."""
    words = sum(state_words(layer.experts, layer.experts).size + padded(layer.experts) for layer in layers)
    return padded_bytes(8 * (words + 2 * MOST_ENTRIES))


def padded(words: int) -> int:
    """int64 words up to the next multiple of 64 bytes."""
    return -(-words // 8) * 8
