"""A bundle onto one GPU or several: with all its experts where they fit, else with as many as the budgets hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.files.reader import find_bundle, read_bundle, stamp, weight_names
from moec.artifacts.files.verify import check_hashes
from moec.artifacts.paths import DENSE_NAME
from moec.artifacts.sections import whole_section
from moec.errors import RequestError
from moec.runtime.chain.executor import ChainExecutor
from moec.runtime.devices.cuda.measure import copy_speeds
from moec.runtime.devices.cuda.modules.architecture import choose_cuda_target
from moec.runtime.devices.cuda.modules.libraries import load_cuda_libraries
from moec.runtime.devices.cuda.offload.calls import OffloadedExperts
from moec.runtime.devices.cuda.offload.employing import employ_cpu
from moec.runtime.devices.cuda.starting import start_devices
from moec.runtime.engine import Engine
from moec.runtime.engine.scheduler import limits_of
from moec.runtime.loading.cuda_section import SectionLoader
from moec.runtime.loading.links import describe_division, make_links
from moec.runtime.loading.prefixes import choose_prefix_caching
from moec.runtime.loading.read_ahead import ReadAhead
from moec.runtime.machine.libraries import host_cpu_features, load_runtime
from moec.runtime.machine.threads import helper_threads
from moec.runtime.memory.cuda_planning import MemoryPlanner, device_limit
from moec.runtime.memory.divided import DividedPlan, DivisionPlanner
from moec.runtime.model import Model
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.sharing.loading import cpu_side
from moec.runtime.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.files.manifest import TargetRecord
    from moec.artifacts.sections import Section
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.memory.cuda_planning import CudaOptions
    from moec.runtime.memory.device_budget import DevicePlan
    from moec.runtime.sharing.loading import CpuSide


@dataclass(frozen=True)
class _Plan:
    """Who runs what, with which memory."""

    sections: tuple[Section, ...]
    plans: tuple[DevicePlan, ...]
    memory: DevicePlan | DividedPlan
    """What the model says of it."""
    side: CpuSide | None = None
    helpers: int = 0
    """Threads of the CPU that compute a share of the missing experts, for each GPU."""
    copy_thread: bool | None = None
    """Whether another one feeds the copy engine, see `employ_cpu`."""


def load_cuda(path: str | Path, options: CudaOptions, progress: Callable[[int], None] | None) -> Model:
    """See `moec.runtime.load`.

    GPUs are started while records are parsed and the disk reads ahead, and code is bound while weights arrive.
    """
    found = find_bundle(path, options.verify)
    ahead = ReadAhead(found.path, weight_names(found.manifest))
    with start_devices(options.ordinals) as starting, ahead:
        bundle = read_bundle(found, progress, weights_later=True)
        sharing, notes = choose_prefix_caching(bundle.model, options.prefix_caching)
        threads = load_runtime(None if options.cpu_threads is None else max(1, options.cpu_threads))
        devices = starting.devices()
        load_cuda_libraries()
        features = host_cpu_features()
        targets = tuple(
            choose_cuda_target(bundle.manifest.targets, device.capability, device.name, features)
            for device in devices
        )
        plan = _plan(bundle, devices, targets, options)
        for device, own in zip(devices, plan.plans, strict=True):
            device.open(own.limit_bytes, own.needs.staging_bytes, own.needs.code_bytes)
        ahead.stop()
        hashed, stats = found.unhashed, Stats()
        loaders: list[SectionLoader] = []
        try:
            loaders.extend(
                SectionLoader(*parts, hashed, progress)
                for parts in zip(devices, plan.sections, targets, plan.plans, strict=True)
            )
            sections = [loader.assemble(options.max_batch, stats) for loader in loaders]
            if len(devices) > 1 and DENSE_NAME in hashed:
                check_hashes(bundle.path, bundle.manifest, [DENSE_NAME])
            for loader in loaders:
                loader.weights.upload.finish()
        finally:
            for loader in loaders:
                loader.weights.upload.abandon()
        if len(devices) > 1:
            notes += describe_division(devices, plan.sections)
        for device, loader, section in zip(devices, loaders, sections, strict=True):
            if isinstance(section.experts, OffloadedExperts) and plan.side is not None:
                cpu = plan.side, plan.helpers, plan.copy_thread, loader.step_tokens
                notes += employ_cpu(device, loader.bundle, loader.functions, section.experts, *cpu)
        links = make_links(sections, devices, plan.sections, plan.plans, options.max_batch)
        # Behind the CPU's threads: as the interpreter ends, what was made last goes first, and steps need them.
        executor = ChainExecutor(sections, bundle.model.vocab_size, stats, links)
        if hashed or not found.checked:
            stamp(found, hashed)
        step_tokens = min(loader.step_tokens for loader in loaders)
        sizes = options.max_batch, step_tokens, plan.memory.cache_pages
        limits = limits_of(bundle.model, *sizes, prefix_caching=sharing)
        engine = Engine(executor, limits, Vocabulary.of(bundle.model), stats)
        names = ", ".join(dict.fromkeys(target.name for target in targets))
        return Model(
            bundle.path,
            bundle.model,
            names,
            plan.memory,
            engine,
            executor,
            threads,
            notes=tuple(dict.fromkeys(notes)),
        )


def _plan(
    bundle: Bundle, devices: list[CudaDevice], targets: tuple[TargetRecord, ...], options: CudaOptions
) -> _Plan:
    """Divide memory; nothing is allocated yet.

    Raises:
        BudgetError: there is too little.
        DeviceError: the model cannot be divided among so many GPUs.
        RequestError: the CPU's threads are to work for several GPUs.
    """
    limits = []
    for device, memory in zip(devices, options.device_memory, strict=True):
        device.enter()
        limits.append(device_limit(memory, *device.driver.memory_info()))
    if len(devices) > 1:
        return _divide(bundle, devices, targets, options, tuple(limits))
    section = whole_section(bundle)
    planner = MemoryPlanner(section, targets[0], options, limits[0])
    resident = planner.resident()
    if resident is not None:
        return _Plan((section,), (resident,), resident)
    helpers = helper_threads(options.cpu_threads, fed=bool(options.copy_thread))
    side = cpu_side(bundle, host_cpu_features(), helpers, options.copy_thread)
    # Where nobody asks for it a thread feeds in place of those that compute, and so does its memory.
    plan = planner.offloaded(shared=side.serve is not None, fed=bool(options.copy_thread))
    return _Plan((section,), (plan,), plan, side, helpers, options.copy_thread)


def _divide(
    bundle: Bundle,
    devices: list[CudaDevice],
    targets: tuple[TargetRecord, ...],
    options: CudaOptions,
    limits: tuple[int, ...],
) -> _Plan:
    if options.cpu_threads and options.cpu_threads < len(devices):
        raise RequestError(
            f"cpu_threads={options.cpu_threads} is too few for {len(devices)} GPUs.",
            "Each GPU has threads of its own.",
            f"Give {len(devices)} or more, or 0: none.",
        )
    if options.copy_thread:
        raise RequestError(
            "copy_thread does not go with several GPUs.",
            "A thread of the CPU feeds the copy engine of one GPU only.",
            "Leave copy_thread out, or give one GPU.",
        )
    speeds = tuple(
        copy_speeds(device.driver, device.ordinal, limit)
        for device, limit in zip(devices, limits, strict=True)
    )
    planner = DivisionPlanner(bundle, targets, options, limits, speeds)
    resident = planner.resident()
    if resident is not None:
        return _Plan(resident.sections, resident.plans, resident)
    helpers = helper_threads(options.cpu_threads) // len(devices)
    side = cpu_side(bundle, host_cpu_features(), helpers, copy_thread=False)
    plan = planner.offloaded(shared=side.serve is not None)
    return _Plan(plan.sections, plan.plans, plan, side, helpers, copy_thread=False)
