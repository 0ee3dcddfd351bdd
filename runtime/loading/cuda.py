"""A bundle onto a GPU: with all its experts where they fit, else with as many as the budget holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.cache import cache_layers
from moec.artifacts.footprint import LOGIT_ROWS, selection_layers, state_layers
from moec.artifacts.reader import find_bundle, read_bundle, stamp, weight_names
from moec.artifacts.sampling import SAMPLE
from moec.runtime.cache.states import StateStorage
from moec.runtime.cache.storage import CacheStorage
from moec.runtime.chain.binding import Binder
from moec.runtime.chain.executor import ChainExecutor
from moec.runtime.chain.section import ChainSection
from moec.runtime.devices.cuda.architecture import choose_cuda_target
from moec.runtime.devices.cuda.libraries import load_cuda_libraries
from moec.runtime.devices.cuda.offload.calls import OffloadedExperts
from moec.runtime.devices.cuda.offload.helping import let_cpu_help
from moec.runtime.devices.cuda.offload.loading import offloaded_experts
from moec.runtime.devices.cuda.routing_log import DeviceRoutingLog
from moec.runtime.devices.cuda.sampling import DeviceSampler
from moec.runtime.devices.cuda.starting import start_device
from moec.runtime.devices.cuda.weights import ResidentExperts, ResidentWeights
from moec.runtime.engine import Engine
from moec.runtime.engine.scheduler import limits_of
from moec.runtime.loading.read_ahead import ReadAhead
from moec.runtime.machine.libraries import host_cpu_features, load_runtime
from moec.runtime.machine.threads import helper_threads
from moec.runtime.memory.cuda_planning import MemoryPlanner, device_limit
from moec.runtime.model import Model
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.sharing.loading import cpu_side
from moec.runtime.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from moec.artifacts.bundle import Bundle
    from moec.artifacts.manifest import TargetRecord
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.module import CudaFunctions
    from moec.runtime.experts.calls import ExpertCalls
    from moec.runtime.memory.cuda_planning import CudaOptions
    from moec.runtime.memory.device_budget import DevicePlan


@dataclass(frozen=True)
class _Loading:
    """What a model is put together from."""

    device: CudaDevice
    bundle: Bundle
    target: TargetRecord
    options: CudaOptions
    plan: DevicePlan
    weights: ResidentWeights
    hashed: Collection[str]
    progress: Callable[[int], None] | None


@dataclass(frozen=True)
class _Parts:
    """A model put together."""

    engine: Engine
    executor: ChainExecutor
    experts: ExpertCalls
    functions: CudaFunctions


def load_cuda(path: str | Path, options: CudaOptions, progress: Callable[[int], None] | None) -> Model:
    """See `moec.runtime.load`.

    The GPU is started while records are parsed and the disk reads ahead, and code is bound while weights arrive.
    """
    found = find_bundle(path, options.verify)
    ahead = ReadAhead(found.path, weight_names(found.manifest))
    with start_device(options.ordinal) as starting, ahead:
        bundle = read_bundle(found, progress, weights_later=True)
        threads = load_runtime(None if options.cpu_threads is None else max(1, options.cpu_threads))
        device = starting.device()
        load_cuda_libraries()
        targets, features = bundle.manifest.targets, host_cpu_features()
        target = choose_cuda_target(targets, device.capability, device.name, features)
        device.resources.enter()
        limit = device_limit(options.device_memory, *device.driver.memory_info())
        planner = MemoryPlanner(bundle, target, options, limit)
        resident = planner.resident()
        helpers = 0 if resident is not None else helper_threads(options.cpu_threads)
        side = cpu_side(bundle, features, helpers) if resident is None else None
        plan = resident or planner.offloaded(shared=side is not None and side.serve is not None)
        device.open(plan.limit_bytes, plan.needs.staging_bytes, plan.needs.code_bytes)
        hashed = found.unhashed
        ahead.stop()
        weights = ResidentWeights(device, bundle, hashed, progress, with_experts=plan.slots is None)
        try:
            parts = _assemble(_Loading(device, bundle, target, options, plan, weights, hashed, progress))
            weights.upload.finish()
        finally:
            weights.upload.abandon()
        if isinstance(parts.experts, OffloadedExperts) and side is not None and side.serve is not None:
            let_cpu_help(device, bundle, parts.functions, parts.experts, side, helpers)
        if hashed or not found.checked:
            stamp(found, hashed)
        notes = () if side is None else (side.note,)
        return Model(
            bundle.path, bundle.model, target.name, plan, parts.engine, parts.executor, threads, notes=notes
        )


def _assemble(loading: _Loading) -> _Parts:
    device, bundle, plan, options = loading.device, loading.bundle, loading.plan, loading.options
    stats = Stats()
    functions = device.load(bundle.path, loading.target.files)
    stats.bytes_moved = plan.needs.expert_bytes
    experts: ExpertCalls = (
        ResidentExperts(device, bundle, loading.weights)
        if plan.slots is None
        else offloaded_experts(
            device,
            bundle,
            functions,
            loading.target.name,
            plan.slots,
            plan.ahead,
            loading.weights,
            loading.hashed,
            loading.progress,
        )
    )
    cache = CacheStorage(device, cache_layers(bundle.model), plan.cache_pages, selection_layers(bundle.model))
    states = StateStorage(device, state_layers(bundle.model), options.max_batch)
    planned = plan.needs.step_tokens
    limits = limits_of(bundle.model, options.max_batch, _step_tokens(plan), plan.cache_pages)
    binder = Binder(
        device,
        bundle,
        bundle.programs[loading.target.name],
        functions,
        cache,
        states,
        experts,
        planned,
        min(planned, LOGIT_ROWS),
        loading.weights.dense,
    )
    sampler = None
    if functions.has(SAMPLE):
        choose = functions.get(SAMPLE)
        sampler = DeviceSampler(device, choose, bundle.model.vocab_size, options.max_batch)
    log = DeviceRoutingLog(device, bundle.model, options.max_batch) if bundle.model.experts else None
    section = ChainSection(device, binder, experts, stats, sampler, log)
    executor = ChainExecutor(section, bundle.model.vocab_size, stats)
    return _Parts(Engine(executor, limits, Vocabulary.of(bundle.model), stats), executor, experts, functions)


def _step_tokens(plan: DevicePlan) -> int:
    """Tokens of the largest step: as planned, or what can run where large steps have no room to stream."""
    slots, planned = plan.slots, plan.needs.step_tokens
    if slots is None or slots.streams:
        return planned
    return min(planned, slots.most_entries // max(layer.top_k for layer in slots.layers))
