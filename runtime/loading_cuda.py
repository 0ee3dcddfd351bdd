"""A bundle onto a GPU, with all its experts."""

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
from moec.runtime.device_budget import DevicePlan, device_needs, plan_device_memory
from moec.runtime.devices.cuda.architecture import choose_cuda_target
from moec.runtime.devices.cuda.libraries import load_cuda_libraries
from moec.runtime.devices.cuda.sampling import DeviceSampler
from moec.runtime.devices.cuda.starting import start_device
from moec.runtime.devices.cuda.weights import ResidentExperts, ResidentWeights
from moec.runtime.engine import Engine, Limits
from moec.runtime.executor import ChainExecutor
from moec.runtime.libraries import host_cpu_features, load_runtime
from moec.runtime.model import Model
from moec.runtime.stats import Stats
from moec.runtime.step_tokens import plan_largest_step

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from moec.artifacts.manifest import TargetRecord
    from moec.artifacts.reader import Bundle
    from moec.artifacts.verify import Level
    from moec.runtime.devices.cuda.device import CudaDevice

HEADROOM_BYTES = 256 << 20
"""Of a GPU's free memory, left alone where no budget is given: its context grows while kernels are loaded."""


@dataclass(frozen=True)
class CudaOptions:
    """What `moec.runtime.load` was told, checked."""

    ordinal: int
    device_memory: int | float | str | None
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
        weights = ResidentWeights(device, bundle, found.unhashed, progress)
        try:
            engine, executor = _assemble(device, bundle, target, plan, options, weights)
            weights.upload.finish()
        finally:
            weights.upload.abandon()
        if found.unhashed or not found.checked:
            stamp(found, weights.hashed)
        return Model(bundle.path, bundle.model, target.name, plan, engine, executor, threads)


def _plan(bundle: Bundle, target: TargetRecord, options: CudaOptions, limit_bytes: int) -> DevicePlan:
    """With the step that was asked for, or the largest that leaves the cache its room."""
    max_batch, max_context, cache_tokens = options.max_batch, bundle.model.max_context, options.cache_tokens

    def plan(step_tokens: int) -> DevicePlan:
        return plan_device_memory(
            device_needs(bundle, target, max_batch=max_batch, max_step_tokens=step_tokens),
            max_context=max_context,
            limit_bytes=limit_bytes,
            cache_tokens=cache_tokens,
            max_batch=max_batch,
        )

    if options.max_step_tokens is not None:
        return plan(options.max_step_tokens)
    return plan_largest_step(plan, max_batch=max_batch, max_context=max_context, cache_tokens=cache_tokens)


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
) -> tuple[Engine, ChainExecutor]:
    stats = Stats()
    functions = device.load(bundle.path, target.files)
    stats.bytes_moved = plan.needs.expert_bytes
    experts = ResidentExperts(device, bundle, weights)
    cache = CacheStorage(device, attention_layers(bundle.model), plan.cache_pages)
    step_tokens = plan.needs.step_tokens
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
