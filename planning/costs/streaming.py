"""Steps of many tokens: experts streamed through buffers on the device, or run from the slots; which is faster.

Times are in milliseconds. Constants are what moec's kernels were measured to reach on an H200.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.schedule import PrefillPlan
from moec.artifacts.sharing import ASKING_US, COPY_US, HANDING_US, MOST_SHARED_TOKENS, WORTH_ASKING
from moec.planning.costs.token import BYTES_PER_MS
from moec.planning.costs.work import step_work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.layout.footprint import Footprint
    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.schedule import RoutingProfile
    from moec.planning.costs.work import Products, StepWork

STREAM_BUFFERS = 2
"""One is filled while the other is read."""
CPU_TOKENS = 5
"""Of an expert: so many a CPU computes in the time that reading its bytes takes; more take as much longer."""
QUANTIZED_CPU_TOKENS = 2
"""The same of a quantized expert, whose bytes are fewer."""
PLAIN_SHARE = 0.57
"""Of `MachineRecord.gpu_tflops` that products of many tokens reach."""
QUANTIZED_SHARE = 0.45
"""The same with quantized weights, whose tiles are always whole."""
QUANTIZED_TILE = 128
"""Tokens of such a tile: those of an expert are filled up."""
ATTENTION_SHARE = 0.3
"""The same of attention."""
STEP_LAYERS = 3.0
"""`MachineRecord.layer_us` that a layer of such a step takes beside all that: it has more than twice the launches of a
decoded token's, and they overlap less."""


def prefill_plan(
    machine: MachineRecord,
    model: ModelRecord,
    facts: Footprint,
    profile: RoutingProfile,
    slots: Sequence[int],
    step_tokens: int,
) -> PrefillPlan:
    """How prompts and large batches run on a GPU with ``slots`` expert slots in each layer."""
    complete = all(held >= layer.experts for layer, held in zip(facts.layers, slots, strict=True))
    times, streamed = StepTimes(machine, facts, step_work(model)), step_tokens + 1
    for tokens in range(1, 1 if complete else step_tokens + 1):
        if times.streamed(slots, tokens) <= times.cached(profile, slots, tokens):
            streamed = tokens
            break
    return PrefillPlan(
        order=tuple(layer.layer for layer in facts.layers),
        buffers=STREAM_BUFFERS,
        buffer_bytes=facts.working_set_bytes,
        streamed_from_tokens=streamed,
        milliseconds_per_step=times.streamed(slots, step_tokens)
        if streamed <= step_tokens
        else times.cached(profile, slots, step_tokens),
    )


@dataclass(frozen=True)
class StepTimes:
    """Steps of many tokens of one model on one machine.

    Args:
        machine: sizes and speeds.
        facts: the model's bytes.
        work: what its tokens have to do.
    """

    machine: MachineRecord
    facts: Footprint
    work: StepWork

    def streamed(self, slots: Sequence[int], tokens: int) -> float:
        """Every layer's experts without a slot are copied while the GPU does everything else.

        Or the CPU computes a share of them, by the rule that the runtime has; then the GPU hides nothing.
        """
        machine, beside = self.machine, self._beside(tokens)
        time = beside if not self.facts.layers else 0.0
        for number, (layer, held) in enumerate(zip(self.facts.layers, slots, strict=True)):
            own = self._experts(number, tokens, layer.experts) + beside / len(self.facts.layers)
            missing, pairs = layer.experts - held, tokens * layer.top_k / layer.experts
            link = layer.stride_bytes / BYTES_PER_MS / machine.link_gb_s + COPY_US / 1000
            shared = self._divided(number, missing, pairs, link, HANDING_US) + ASKING_US / 1000
            if tokens <= MOST_SHARED_TOKENS and shared < WORTH_ASKING * missing * link:
                time += max(shared, own)
            else:
                time += max(missing * link, own)
        return time

    def cached(self, profile: RoutingProfile, slots: Sequence[int], tokens: int) -> float:
        """Every expert that some token chooses: those without a slot are fetched, then all are multiplied.

        The CPU computes a share of them here too.
        """
        link = self.machine.link_gb_s * self.machine.link_efficiency
        time = self._beside(tokens)
        rows = zip(self.facts.layers, profile.layers, slots, strict=True)
        for number, (layer, each, held) in enumerate(rows):
            # Tokens that choose independently of each other; those that agree touch fewer experts.
            use = np.minimum(1.0, np.array(each.use_share))
            touched = 1 - (1 - use) ** tokens
            missed = float(touched[held:].sum())
            pairs = tokens * float(use[held:].sum()) / max(missed, 1.0)
            time += self._divided(number, missed, pairs, layer.expert_bytes / BYTES_PER_MS / link, 0.0)
            time += self._experts(number, tokens, float(touched.sum()))
        return time

    def _divided(self, number: int, missing: float, pairs: float, link: float, handing_us: float) -> float:
        """Until missing experts, each with so many pairs, have come over the link or are computed by the CPU."""
        machine = self.machine
        if machine.unified_memory:
            return missing * link
        layer, quantized = self.facts.layers[number], self.work.layers[number].products.quantized
        reading = layer.expert_bytes / BYTES_PER_MS / (machine.host_bandwidth_gb_s * machine.host_efficiency)
        cpu = reading * max(1.0, pairs / (QUANTIZED_CPU_TOKENS if quantized else CPU_TOKENS))
        handing = (handing_us + machine.handshake_us) / 1000
        return min(missing * link, link * (missing * cpu + handing) / (link + cpu))

    def _experts(self, number: int, tokens: int, touched: float) -> float:
        """A layer's experts in the GPU's memory, and their rows."""
        layer, work = self.facts.layers[number], self.work.layers[number]
        pairs = tokens * layer.top_k
        products = self._products(work.products, pairs, touched, touched * layer.expert_bytes)
        return products + self._moving(pairs * work.row_bytes)

    def _beside(self, tokens: int) -> float:
        """All but routed experts."""
        work, facts = self.work, self.facts
        weights = max(0, facts.dense_bytes_per_token - work.last_bytes)
        rows = tokens * work.row_bytes + work.expanded_bytes(tokens)
        layers = max(facts.attention_steps, len(facts.layers))
        return (
            self._products(work.dense, tokens, 1.0, weights)
            + self._moving(work.last_bytes)
            + self._operations(work.attention_operations(tokens), ATTENTION_SHARE)
            + self._moving(rows)
            + layers * STEP_LAYERS * self.machine.layer_us / 1000
        )

    def _products(self, products: Products, rows: float, matrices: float, size: float) -> float:
        """Products of so many rows, divided over matrices of ``size`` bytes in all.

        Reading and multiplying go on at once, and hinder each other most where they take equally long: the root of
        the sum of their squares is between the larger one and the sum.
        """
        filled = matrices * QUANTIZED_TILE * math.ceil(rows / max(matrices, 1.0) / QUANTIZED_TILE)
        multiplying = self._operations(rows * products.plain, PLAIN_SHARE)
        multiplying += self._operations(filled * products.quantized, QUANTIZED_SHARE)
        return math.hypot(multiplying, self._moving(size))

    def _moving(self, size: float) -> float:
        """To and from the GPU's memory."""
        return size / BYTES_PER_MS / (self.machine.gpu_bandwidth_gb_s * self.machine.gpu_efficiency)

    def _operations(self, count: float, share: float) -> float:
        return count / (self.machine.gpu_tflops * share * 1e9) if self.machine.gpu_tflops else 0.0
