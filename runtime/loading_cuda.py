"""A bundle onto a GPU: with all its experts where they fit, else with as many as the budget holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.footprint import LOGIT_ROWS
from moec.artifacts.reader import open_bundle
from moec.artifacts.sampling import SAMPLE
from moec.errors import BudgetError
from moec.runtime.binding import Binder
from moec.runtime.budget import parse_memory
from moec.runtime.cache.storage import CacheStorage, attention_layers
from moec.runtime.device_budget import DevicePlan, device_needs, plan_device_memory, plan_offload
from moec.runtime.devices.cuda.architecture import choose_cuda_target
from moec.runtime.devices.cuda.device import BOUNCE_BYTES, CudaDevice, check_ordinal, tvm_stream
from moec.runtime.devices.cuda.libraries import load_cuda_libraries
from moec.runtime.devices.cuda.nvidia import NvidiaDriver
from moec.runtime.devices.cuda.offload.calls import OffloadedExperts
from moec.runtime.devices.cuda.offload.helping import let_cpu_help
from moec.runtime.devices.cuda.offload.loading import offloaded_experts
from moec.runtime.devices.cuda.sampling import DeviceSampler
from moec.runtime.devices.cuda.sharing import device_bytes, host_bytes
from moec.runtime.devices.cuda.weights import ResidentExperts, ResidentWeights
from moec.runtime.engine import Engine, Limits
from moec.runtime.executor import ChainExecutor
from moec.runtime.libraries import host_cpu_features, load_runtime
from moec.runtime.machine import available_memory, total_memory
from moec.runtime.model import Model
from moec.runtime.sharing.loading import cpu_side
from moec.runtime.stats import Stats
from moec.runtime.threads import default_threads

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from moec.artifacts.manifest import TargetRecord
    from moec.artifacts.reader import Bundle
    from moec.artifacts.verify import Level
    from moec.runtime.devices.cuda.module import CudaFunctions
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
    max_step_tokens: int
    cache_tokens: int | None
    verify: Level


@dataclass(frozen=True)
class _Parts:
    """A model put together."""

    engine: Engine
    executor: ChainExecutor
    experts: ExpertCalls
    functions: CudaFunctions


def load_cuda(path: str | Path, options: CudaOptions, progress: Callable[[int], None] | None) -> Model:
    """See `moec.runtime.load`."""
    driver = NvidiaDriver()
    check_ordinal(driver, options.ordinal)
    bundle = open_bundle(path, verify=options.verify, progress=progress, weights_later=True)
    name, capability = driver.device_name(options.ordinal), driver.capability(options.ordinal)
    target = choose_cuda_target(bundle.manifest.targets, capability, name, host_cpu_features())
    threads = load_runtime(None if options.cpu_threads is None else max(1, options.cpu_threads))
    load_cuda_libraries()
    device = CudaDevice(driver, options.ordinal, tvm_stream)
    try:
        helpers = helper_threads(options.cpu_threads)
        side = cpu_side(bundle, host_cpu_features(), helpers)
        plan = _plan(bundle, target, options, *driver.memory_info(), shared=side.serve is not None)
        parts = _assemble(device, bundle, target, plan, options, progress)
        if isinstance(parts.experts, OffloadedExperts) and side.serve is not None:
            let_cpu_help(device, bundle, parts.functions, parts.experts, side, helpers)
    except BaseException:
        device.close()
        raise
    notes = (side.note,) if plan.slots is not None else ()
    return Model(
        bundle.path, bundle.model, target.name, plan, parts.engine, parts.executor, threads, notes=notes
    )


def helper_threads(cpu_threads: int | None) -> int:
    """CPU threads that compute experts beside a GPU: as asked for, or all but the one that waits for the GPU."""
    return max(1, default_threads() - 1) if cpu_threads is None else cpu_threads


def _plan(
    bundle: Bundle, target: TargetRecord, options: CudaOptions, free: int, total: int, *, shared: bool
) -> DevicePlan:
    """All experts on the GPU where they fit beside the rest, otherwise as many as there is room for."""
    limit = _limit(options.device_memory, free, total)
    needs = device_needs(bundle, target, max_batch=options.max_batch, max_step_tokens=options.max_step_tokens)
    try:
        return plan_device_memory(
            needs,
            max_context=bundle.model.max_context,
            limit_bytes=limit,
            cache_tokens=options.cache_tokens,
            max_batch=options.max_batch,
        )
    except BudgetError:
        if not bundle.model.experts:
            raise
    share_host = host_bytes(bundle.model) if shared else 0
    return plan_offload(
        bundle,
        needs,
        limit_bytes=limit,
        host_bytes=_host_room(options.host_memory, needs.staging_bytes + share_host),
        share_bytes=device_bytes(bundle.model) if shared else 0,
        cache_tokens=options.cache_tokens,
        max_batch=options.max_batch,
    )


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
    progress: Callable[[int], None] | None,
) -> _Parts:
    stats = Stats()
    device.open(plan.limit_bytes, plan.needs.staging_bytes, plan.needs.code_bytes)
    functions = device.load(bundle.path, target.files)
    weights = ResidentWeights(device, bundle, options.verify, progress, with_experts=plan.slots is None)
    stats.bytes_moved = plan.needs.expert_bytes
    experts: ExpertCalls = (
        ResidentExperts(device, bundle, weights)
        if plan.slots is None
        else offloaded_experts(device, bundle, functions, plan.slots, weights, options.verify, progress)
    )
    cache = CacheStorage(device, attention_layers(bundle.model), plan.cache_pages)
    step_tokens = _step_tokens(plan, options)
    limits = Limits(options.max_batch, step_tokens, bundle.model.max_context, plan.cache_pages)
    binder = Binder(
        device,
        bundle,
        bundle.programs[target.name],
        functions,
        cache,
        experts,
        options.max_step_tokens,
        min(options.max_step_tokens, LOGIT_ROWS),
        weights.dense,
    )
    sampler = None
    if functions.has(SAMPLE):
        choose = functions.get(SAMPLE)
        sampler = DeviceSampler(device, choose, bundle.model.vocab_size, options.max_batch)
    executor = ChainExecutor(device, binder, experts, stats, sampler)
    return _Parts(Engine(executor, limits, bundle.model.vocab_size, stats), executor, experts, functions)


def _step_tokens(plan: DevicePlan, options: CudaOptions) -> int:
    """Tokens of the largest step: as asked for, or what can run where large steps have no room to stream."""
    slots = plan.slots
    if slots is None or slots.streams:
        return options.max_step_tokens
    return min(options.max_step_tokens, slots.most_entries // max(layer.top_k for layer in slots.layers))
