"""From a bundle's path to a `Model`: verify, plan memory, map, bind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.files.reader import open_bundle
from moec.artifacts.files.verify import LEVELS
from moec.artifacts.layout.cache import cache_layers, sequence_tokens
from moec.artifacts.layout.footprint import LOGIT_ROWS, footprint, selection_layers, state_layers
from moec.artifacts.schedule import DEFAULT_POLICY, NO_PREFETCH, best_schedule
from moec.artifacts.sections import whole_section
from moec.errors import DeviceError, RequestError
from moec.planning.policies import always_admitting
from moec.runtime.cache.states import StateStorage
from moec.runtime.cache.storage import CacheStorage
from moec.runtime.chain.binding import Binder
from moec.runtime.chain.executor import ChainExecutor
from moec.runtime.chain.section import ChainSection
from moec.runtime.devices.cpu import CpuDevice
from moec.runtime.devices.names import budgets_of, parse_ordinals
from moec.runtime.engine import Engine
from moec.runtime.engine.scheduler import limits_of
from moec.runtime.experts.calls import HostExperts
from moec.runtime.experts.prefetch import make_prefetcher
from moec.runtime.experts.residency import plan_layers
from moec.runtime.experts.tables import ExpertStore
from moec.runtime.loading.prefixes import choose_prefix_caching
from moec.runtime.machine.libraries import (
    choose_cpu_target,
    host_cpu_features,
    load_runtime,
)
from moec.runtime.machine.limits import available_memory, total_memory
from moec.runtime.memory.budget import MemoryPlan, parse_memory, plan_memory
from moec.runtime.memory.step_tokens import CPU_STEP_TOKENS
from moec.runtime.model import Model
from moec.runtime.requests.checks import check_count, check_flag
from moec.runtime.requests.vocabulary import Vocabulary
from moec.runtime.routing.ring import DEFAULT_CAPACITY
from moec.runtime.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.files.manifest import TargetRecord
    from moec.artifacts.files.verify import Level
    from moec.artifacts.schedule import Schedule
    from moec.runtime.devices.names import Budget
    from moec.runtime.engine import Limits
    from moec.runtime.experts.residency import LayerPlan


MOST_THREADS = 4096
"""That may be asked for: a pool starts them all."""


def load(
    path: str | Path,
    *,
    device: str | Sequence[str] = "cpu",
    device_memory: Budget | Sequence[Budget] = None,
    host_memory: int | float | str | None = None,
    cpu_threads: int | None = None,
    max_batch: int = 8,
    max_step_tokens: int | None = None,
    cache_tokens: int | None = None,
    prefetch: bool | None = None,
    copy_thread: bool | None = None,
    prefix_caching: bool | None = False,
    trace_path: str | Path | None = None,
    trace_capacity: int = DEFAULT_CAPACITY,
    verify: Level = "once",
    progress: Callable[[int], None] | None = None,
) -> Model:
    """Load a bundle.

    Args:
        path: the bundle's folder.
        device: ``cpu``, or ``cuda:0``: the first GPU, with all experts in its memory where they fit, else with a cache
            of experts in its memory and the others in host memory and in the file. Several, ``["cuda:0", "cuda:1"]`` or
            ``cuda:0,cuda:1``: the layers are divided among them, by their budgets and measured speeds.
        device_memory: hard limit on what the model allocates on the GPU (weights, cache, activations, code): bytes, a
            text such as ``8GiB`` or ``75%``, or a ratio of the GPU's memory. ``None``: what is free, less some. The
            driver's own context is not counted. Of several GPUs it is that of each, or a list with one for each. On
            ``cpu`` it must be ``None``.
        host_memory: hard limit on what the model keeps resident (weights, cache, activations): bytes, a text
            such as ``8GiB`` or ``75%``, or a ratio such as 0.75 of the machine's memory. Experts beyond it
            stay in the file. ``None``: no limit; with a GPU, nine tenths of what is available. With a GPU it counts
            pinned memory: experts, and what every step is told. Python itself and its libraries are not counted.
        cpu_threads: threads of the kernels; ``None``: all CPUs that the process may use (by its affinity, its
            cgroup's quota and ``OMP_NUM_THREADS``). The last load decides for all models of the process. Only
            the first can have more threads than there are CPUs. On a GPU these compute a share of the experts that
            it does not have, in decoding and in prompts: ``None``: all CPUs but one, 0: none. Several GPUs have an
            equal part each.
        max_batch: sequences that run at once.
        max_step_tokens: most tokens of one step, all sequences together; longer prompts are run in several. ``None``:
            512 on ``cpu``, or behind an encoder a whole context, since a source is read in one step; on a GPU 4096, or
            fewer where memory is short. Prompts that join sequences which are already generating take at most 1024
            (see `moec.runtime.engine.scheduler`), so that those go on.
        cache_tokens: room in the key-value cache, all sequences together; ``None``: ``max_batch`` full
            contexts, but at most a quarter of ``host_memory`` (of the free memory where there is no limit); on a
            GPU at most what its weights leave.
        prefetch: bring the experts that the next layer will likely choose while this one computes. ``None``: where the
            schedule found a gain in it; True, False: on, off. Only where not all experts fit; on a GPU pieces of them,
            while the link is free, in steps of at most 8 tokens. `Stats.prefetch` says how good the guesses were.
        copy_thread: on a GPU that does not hold all experts, have one more CPU thread feed its copy engine, which
            brings missing experts 5 to 8 % sooner than the GPU reads them by itself, where they have several MB. It
            takes a core while steps run: where ``cpu_threads`` is ``None``, one less computes. ``None``: only where
            ``cpu_threads`` are allowed and have no share to compute; True, False: on, off.
        prefix_caching: keep what the cache holds of sequences that have ended until the room is needed, and let a
            prompt that begins with the same tokens take it over, in pages of 32 tokens, instead of running these again.
            Results may then differ in their last bits, by what was run before: what is taken over was made in steps of
            other sizes, which add up in another order. ``None``: where the model can; not where layers keep states or
            behind an encoder. `Stats.reused_tokens` says what it saved.
        trace_path: file to keep the routing of whatever is run in, for ``moec plan --traces``; written when the model
            is closed. See `Model.record_routing`, also for what that costs on a GPU.
        trace_capacity: tokens that it keeps; the oldest go first.
        verify: ``full`` hashes every file. ``once`` hashes weight files only where that was not done before: what was
            found right is noted in the user's cache folder, with sizes, inodes and times of last change. ``sizes``
            hashes the JSON files alone. Sizes are always compared.
        progress: told the bytes of each piece hashed or brought to the GPU, from several threads.

    Raises:
        BundleError: the bundle is missing, damaged or too new.
        DeviceError: this machine cannot run the bundle on ``device``.
        OutputError: ``trace_path`` is in no folder, or in one that cannot be written.
        BudgetError: ``host_memory`` or ``device_memory`` does not hold the least that is needed; nothing was
            allocated.
        RequestError: an option is out of range.
    """
    ordinals = parse_ordinals(device)
    _check_device_memory(ordinals, device_memory)
    _check_copy_thread(ordinals, copy_thread)
    _check_level(verify)
    check_flag("prefetch", prefetch)
    check_flag("prefix_caching", prefix_caching)
    trace_capacity = _count("trace_capacity", trace_capacity, least=1)
    max_batch = _count("max_batch", max_batch, least=1)
    if max_step_tokens is not None:
        max_step_tokens = _count("max_step_tokens", max_step_tokens, least=max_batch + 1)
    if cpu_threads is not None:
        cpu_threads = _count("cpu_threads", cpu_threads, least=0 if ordinals else 1, most=MOST_THREADS)
    if cache_tokens is not None:
        cache_tokens = _count("cache_tokens", cache_tokens, least=1)
    if ordinals:
        from moec.runtime.loading.cuda import load_cuda
        from moec.runtime.memory.cuda_planning import CudaOptions

        sizes = max_batch, max_step_tokens, cache_tokens
        budgets = budgets_of(device_memory, len(ordinals))
        flags = prefetch, copy_thread, prefix_caching
        options = CudaOptions(ordinals, budgets, host_memory, cpu_threads, *sizes, *flags, verify)
        return _recording(load_cuda(path, options, progress), trace_path, trace_capacity)
    budget = None if host_memory is None else parse_memory(host_memory, total_memory(), "host_memory")
    bundle = open_bundle(path, verify=verify, progress=progress)
    sharing, notes = choose_prefix_caching(bundle.model, prefix_caching)
    target = choose_cpu_target(bundle.manifest.targets, host_cpu_features())
    if max_step_tokens is None:
        source = bundle.model.max_context if bundle.model.encoder else 0
        max_step_tokens = max(CPU_STEP_TOKENS, max_batch + 1, source)
    needs = footprint(bundle.model)
    memory = plan_memory(
        needs,
        max_context=sequence_tokens(bundle.model),
        host_memory=budget,
        available_bytes=available_memory(),
        cache_tokens=cache_tokens,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
    )
    threads = load_runtime(cpu_threads)
    limits = limits_of(bundle.model, max_batch, max_step_tokens, memory.cache_pages, prefix_caching=sharing)
    schedule = _schedule(bundle, memory)
    layers = plan_layers(needs.layers, bundle.schedule.profile, memory.expert_capacity_bytes)
    engine, executor = _assemble(bundle, target, limits, layers, schedule, prefetch)
    model = Model(bundle.path, bundle.model, target.name, memory, engine, executor, threads, notes=notes)
    return _recording(model, trace_path, trace_capacity)


def _count(name: str, value: int, least: int, most: int | None = None) -> int:
    """``value``, which may be one of NumPy's, checked."""
    check_count(name, value, least, most)
    return int(value)


def _recording(model: Model, path: str | Path | None, capacity: int) -> Model:
    """``model``, recording to ``path`` where that is given; closed again where it cannot."""
    if path is not None:
        try:
            model.record_routing(path, capacity)
        except BaseException:
            model.close()
            raise
    return model


def _assemble(
    bundle: Bundle,
    target: TargetRecord,
    limits: Limits,
    layers: tuple[LayerPlan, ...],
    schedule: Schedule | None,
    prefetch: bool | None,
) -> tuple[Engine, ChainExecutor]:
    device, stats = CpuDevice(), Stats()
    views = [bundle.experts_view(layer.layer) for layer in bundle.model.experts]
    policy = always_admitting(DEFAULT_POLICY if schedule is None else schedule.policy)
    plan = NO_PREFETCH if schedule is None else schedule.prefetch
    store = ExpertStore(views, layers, stats, policy)
    experts = HostExperts(store, make_prefetcher(bundle, plan, prefetch, stats))
    cache = CacheStorage(
        device, cache_layers(bundle.model), limits.cache_pages, selection_layers(bundle.model)
    )
    states = StateStorage(device, state_layers(bundle.model), limits.max_batch)
    functions = device.load(bundle.path, target.files)
    rows = min(limits.max_step_tokens, LOGIT_ROWS)
    binder = Binder(
        device,
        whole_section(bundle),
        bundle.programs[target.name],
        functions,
        cache,
        states,
        experts,
        limits.max_step_tokens,
        rows,
    )
    section = ChainSection(device, binder, experts, stats)
    executor = ChainExecutor([section], bundle.model.vocab_size, stats)
    return Engine(executor, limits, Vocabulary.of(bundle.model), stats), executor


def _schedule(bundle: Bundle, memory: MemoryPlan) -> Schedule | None:
    """The schedule for this budget; where none fits, that for the smallest, and where none is for the CPU, any."""
    schedules = bundle.schedule.schedules
    for_cpu = [schedule for schedule in schedules if schedule.device.total == 0]
    smallest = min(for_cpu, key=lambda schedule: schedule.host.total, default=next(iter(schedules), None))
    return best_schedule(schedules, 0, memory.total_bytes) or smallest


def _check_device_memory(ordinals: tuple[int, ...], device_memory: object) -> None:
    if not ordinals and device_memory is not None:
        raise DeviceError(
            "device_memory does not apply to the device cpu.",
            "It limits the memory of a GPU; on the CPU everything is in host memory.",
            "Leave it out, or give host_memory instead.",
        )


def _check_copy_thread(ordinals: tuple[int, ...], copy_thread: bool | None) -> None:
    check_flag("copy_thread", copy_thread)
    if not ordinals and copy_thread:
        raise DeviceError(
            "copy_thread does not apply to the device cpu.",
            "It feeds the copy engine of a GPU.",
            "Leave it out, or choose a GPU.",
        )


def _check_level(verify: str) -> None:
    if verify not in LEVELS:
        raise RequestError(
            f"verify={verify!r} is no level.", f"Levels are {', '.join(LEVELS)}.", "Change verify."
        )
