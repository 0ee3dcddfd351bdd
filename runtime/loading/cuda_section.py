"""A section of a chain onto its GPU: weights on their way, memory, functions, and what is made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.layout.cache import cache_layers
from moec.artifacts.layout.footprint import LOGIT_ROWS, selection_layers, state_layers
from moec.artifacts.words.sampling import SAMPLE
from moec.runtime.cache.states import StateStorage
from moec.runtime.cache.storage import CacheStorage
from moec.runtime.chain.binding import Binder
from moec.runtime.chain.section import ChainSection
from moec.runtime.devices.cuda.offload.loading import offloaded_experts
from moec.runtime.devices.cuda.routing_log import DeviceRoutingLog
from moec.runtime.devices.cuda.sampling import DeviceSampler
from moec.runtime.devices.cuda.uploading.weights import ResidentExperts, ResidentWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.files.manifest import TargetRecord
    from moec.artifacts.sections import Section
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.modules.module import CudaFunctions
    from moec.runtime.experts.calls import ExpertCalls
    from moec.runtime.memory.device_budget import DevicePlan
    from moec.runtime.stats import Stats


class SectionLoader:
    """Brings a section to its GPU, which was opened; its weights' ``upload`` must be finished or abandoned.

    Args:
        device: the GPU.
        section: what it runs.
        target: the module for it.
        plan: its memory.
        hashed: weight files that are hashed while they are read.
        progress: told the bytes of each piece, from several threads.

    Raises:
        BundleError: the module is damaged.
        BudgetError: the GPU has too little memory.
    """

    def __init__(
        self,
        device: CudaDevice,
        section: Section,
        target: TargetRecord,
        plan: DevicePlan,
        hashed: Collection[str],
        progress: Callable[[int], None] | None,
    ) -> None:
        self._device, self._section, self._target, self._plan = device, section, target, plan
        self._hashed, self._progress = hashed, progress
        self.weights = ResidentWeights(device, section, hashed, progress, with_experts=plan.slots is None)

    @property
    def bundle(self) -> Bundle:
        """What is loaded."""
        return self._section.bundle

    @property
    def step_tokens(self) -> int:
        """Tokens of the largest step: as planned, or what can run where large steps have no room to stream."""
        slots, planned = self._plan.slots, self._plan.needs.step_tokens
        if slots is None or slots.streams:
            return planned
        return min(planned, slots.most_entries // max(layer.top_k for layer in slots.layers))

    def assemble(self, max_batch: int, stats: Stats) -> ChainSection:
        """What runs the section, for so many sequences at once.

        Raises:
            BundleError: the module has not all functions, or a file is damaged.
            BudgetError: the GPU or the host has too little memory.
        """
        device, section, plan = self._device, self._section, self._plan
        model, functions = section.bundle.model, device.load(section.bundle.path, self._target.files)
        self.functions = functions
        stats.bytes_moved += plan.needs.expert_bytes
        experts = self._experts(functions)
        planned = plan.needs.step_tokens
        binder = Binder(
            device,
            section,
            section.bundle.programs[self._target.name],
            functions,
            CacheStorage(device, cache_layers(model), plan.cache_pages, selection_layers(model)),
            StateStorage(device, state_layers(model), max_batch),
            experts,
            planned,
            min(planned, LOGIT_ROWS),
            self.weights.dense,
        )
        sampler = None
        if functions.has(SAMPLE) and not section.leaving:
            sampler = DeviceSampler(device, functions.get(SAMPLE), model.vocab_size, max_batch)
        log = DeviceRoutingLog(device, model, max_batch, section.experts_before) if model.experts else None
        return ChainSection(device, binder, experts, stats, sampler, log)

    def _experts(self, functions: CudaFunctions) -> ExpertCalls:
        device, bundle, plan = self._device, self._section.bundle, self._plan
        if plan.slots is None:
            return ResidentExperts(device, bundle, self.weights)
        return offloaded_experts(
            device,
            bundle,
            functions,
            self._target.name,
            plan.slots,
            plan.ahead,
            self.weights,
            self._hashed,
            self._progress,
        )
