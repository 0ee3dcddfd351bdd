"""A bundle onto a GPU: with all its experts where they fit, else with as many as the budget holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.footprint import LOGIT_ROWS
from moec.artifacts.reader import find_bundle, read_bundle, stamp
from moec.artifacts.sampling import SAMPLE
from moec.errors import BudgetError
from moec.runtime.binding import Binder
from moec.runtime.budget import parse_memory
from moec.runtime.cache.storage import CacheStorage, attention_layers
from moec.runtime.device_budget import (
    DeviceNeeds,
    DevicePlan,
    device_needs,
    plan_device_memory,
    plan_offload,
)
from moec.runtime.devices.cuda.architecture import choose_cuda_target
from moec.runtime.devices.cuda.device import BOUNCE_BYTES
from moec.runtime.devices.cuda.libraries import load_cuda_libraries
from moec.runtime.devices.cuda.offload.loading import offloaded_experts
from moec.runtime.devices.cuda.sampling import DeviceSampler
from moec.runtime.devices.cuda.starting import start_device
from moec.runtime.devices.cuda.weights import ResidentExperts, ResidentWeights
from moec.runtime.engine import Engine, Limits
from moec.runtime.executor import ChainExecutor
from moec.runtime.libraries import host_cpu_features, load_runtime
from moec.runtime.machine import available_memory, total_memory
from moec.runtime.model import Model
from moec.runtime.stats import Stats
from moec.runtime.step_tokens import plan_largest_step, plan_offloaded_step

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from moec.artifacts.manifest import TargetRecord
    from moec.artifacts.reader import Bundle
    from moec.artifacts.verify import Level
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.expert_calls import ExpertCalls

HEADROOM_BYTES = 256 << 20
"""Of a GPU's free memory, left alone where no budget is given: its context grows while kernels are loaded."""

HOST_SHARE = 0.9
"""Of the memory that the host has available, at most, is for experts where no budget is given."""


@dataclass(frozen=True)
class CudaOptions:
    """What `moec.runtime.load` was told, checked."""

    ordinal: int
    device_memory: int | float | str | None
    host_memory: int | float | str | None
    cpu_threads: int | None
    max_batch: int
    max_step_tokens: int | None
    """``None``: as many as memory allows, within reason."""
    cache_tokens: int | None
    verify: Level


def load_cuda(path: str | Path, options: CudaOptions, progress: Callable[[int], None] | None) -> Model:
    """See `moec.runtime.load`. The GPU is started while records are parsed, and code is bound while weights arrive."""
    found = find_bundle(path, options.verify)
    with start_device(options.ordinal) as starting:
        bundle = read_bundle(found, progress, weights_later=True)
        threads = load_runtime(options.cpu_threads)
        device = starting.device()
        load_cuda_libraries()
        targets, features = bundle.manifest.targets, host_cpu_features()
        target = choose_cuda_target(targets, device.capability, device.name, features)
        device.resources.enter()
        plan = _plan(bundle, target, options, _limit(options.device_memory, *device.driver.memory_info()))
        device.open(plan.limit_bytes, plan.needs.staging_bytes, plan.needs.code_bytes)
        hashed = found.unhashed
        weights = ResidentWeights(device, bundle, hashed, progress, with_experts=plan.slots is None)
        try:
            engine, executor = _assemble(device, bundle, target, plan, options, weights, hashed, progress)
            weights.upload.finish()
        finally:
            weights.upload.abandon()
        if hashed or not found.checked:
            stamp(found, hashed)
        return Model(bundle.path, bundle.model, target.name, plan, engine, executor, threads)


def _plan(bundle: Bundle, target: TargetRecord, options: CudaOptions, limit_bytes: int) -> DevicePlan:
    """All experts on the GPU where they fit beside the rest, otherwise as many as there is room for.

    With the step that was asked for, or the largest that leaves the others their room.
    """
    max_batch, max_context, cache_tokens = options.max_batch, bundle.model.max_context, options.cache_tokens

    def needs(step_tokens: int) -> DeviceNeeds:
        return device_needs(bundle, target, max_batch=max_batch, max_step_tokens=step_tokens)

    def resident(step_tokens: int) -> DevicePlan:
        return plan_device_memory(
            needs(step_tokens),
            max_context=max_context,
            limit_bytes=limit_bytes,
            cache_tokens=cache_tokens,
            max_batch=max_batch,
        )

    def offloaded(step_tokens: int) -> DevicePlan:
        own = needs(step_tokens)
        return plan_offload(
            bundle,
            own,
            limit_bytes=limit_bytes,
            host_bytes=_host_room(options.host_memory, own.staging_bytes),
            cache_tokens=cache_tokens,
            max_batch=max_batch,
        )

    sizes = {"max_batch": max_batch, "max_context": max_context}
    step_tokens = options.max_step_tokens
    try:
        if step_tokens is not None:
            return resident(step_tokens)
        return plan_largest_step(resident, **sizes, cache_tokens=cache_tokens)
    except BudgetError:
        if not bundle.model.experts:
            raise
    return plan_offloaded_step(offloaded, **sizes) if step_tokens is None else offloaded(step_tokens)


def _host_room(host_memory: int | float | str | None, staging_bytes: int) -> int:
    """Bytes for experts in host memory, beside the pinned memory that every model has."""
    if host_memory is None:
        limit = int(available_memory() * HOST_SHARE)
    else:
        limit = parse_memory(host_memory, total_memory(), "host_memory")
    return max(0, limit - staging_bytes - BOUNCE_BYTES)


def _limit(device_memory: int | float | str | None, free: int, total: int) -> int:
    if device_memory is None:
        return max(0, free - HEADROOM_BYTES)
    limit = parse_memory(device_memory, total, "device_memory")
    if limit > free:
        raise BudgetError(
            f"device_memory is {limit} bytes, and {limit - free} of them are not free.",
            f"The GPU has {total} bytes, of which {free} are free; others may use the same GPU.",
            "Lower device_memory, or end other programs on the GPU.",
        )
    return limit


def _assemble(
    device: CudaDevice,
    bundle: Bundle,
    target: TargetRecord,
    plan: DevicePlan,
    options: CudaOptions,
    weights: ResidentWeights,
    hashed: Collection[str],
    progress: Callable[[int], None] | None,
) -> tuple[Engine, ChainExecutor]:
    stats = Stats()
    functions = device.load(bundle.path, target.files)
    stats.bytes_moved = plan.needs.expert_bytes
    experts: ExpertCalls = (
        ResidentExperts(device, bundle, weights)
        if plan.slots is None
        else offloaded_experts(device, bundle, functions, plan.slots, weights, hashed, progress)
    )
    cache = CacheStorage(device, attention_layers(bundle.model), plan.cache_pages)
    step_tokens = _step_tokens(plan)
    limits = Limits(options.max_batch, step_tokens, bundle.model.max_context, plan.cache_pages)
    binder = Binder(
        device,
        bundle,
        bundle.programs[target.name],
        functions,
        cache,
        experts,
        step_tokens,
        min(step_tokens, LOGIT_ROWS),
        weights.dense,
    )
    sampler = None
    if functions.has(SAMPLE):
        choose = functions.get(SAMPLE)
        sampler = DeviceSampler(device, choose, bundle.model.vocab_size, options.max_batch)
    executor = ChainExecutor(device, binder, experts, stats, sampler)
    return Engine(executor, limits, bundle.model.vocab_size, stats), executor


def _step_tokens(plan: DevicePlan) -> int:
    """Tokens of the largest step: as planned, or what can run where large steps have no room to stream."""
    slots, planned = plan.slots, plan.needs.step_tokens
    if slots is None or slots.streams:
        return planned
    return min(planned, slots.most_entries // max(layer.top_k for layer in slots.layers))
