"""How a model is divided among several GPUs, before anything is allocated: each has a hard limit of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from moec.artifacts.layout.cache import PAGE_TOKENS, sequence_tokens
from moec.artifacts.layout.footprint import footprint, tensor_bytes
from moec.artifacts.sections import cut_places, sections_of, whole_section
from moec.artifacts.sizes import exact_bytes
from moec.errors import BudgetError, DeviceError
from moec.planning.division import DividedChain, GpuRoom, divide, divided_chain, evened
from moec.runtime.chain.layout import value_spec
from moec.runtime.device import padded_bytes
from moec.runtime.devices.cuda.device import BOUNCE_BYTES
from moec.runtime.devices.cuda.offload.helping import device_bytes, host_bytes
from moec.runtime.devices.cuda.routing_log import routing_bytes
from moec.runtime.engine.pages import pages_for
from moec.runtime.experts.slots import state_bytes
from moec.runtime.memory.cuda_planning import MemoryPlanner, Together
from moec.runtime.memory.device_budget import device_needs
from moec.runtime.memory.step_tokens import ARENA_SHARE, step_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.files.manifest import TargetRecord
    from moec.artifacts.sections import Section
    from moec.runtime.devices.cuda.measure import CopySpeeds
    from moec.runtime.memory.cuda_planning import CudaOptions
    from moec.runtime.memory.device_budget import DevicePlan


@dataclass(frozen=True)
class DividedPlan:
    """Bytes on several GPUs; of each by purpose in ``plans``."""

    plans: tuple[DevicePlan, ...]
    sections: tuple[Section, ...] = field(repr=False)
    """What each GPU runs."""

    @property
    def cache_pages(self) -> int:
        """Pages of the key-value cache, of each layer."""
        return self.plans[0].cache_pages

    @property
    def cache_bytes(self) -> int:
        """The key-value cache of all layers."""
        return sum(plan.cache_bytes for plan in self.plans)

    @property
    def dense_bytes(self) -> int:
        """All weights outside routed experts; twice those that two GPUs need."""
        return sum(plan.dense_bytes for plan in self.plans)

    @property
    def expert_bytes(self) -> int:
        """All routed experts, or what there is for them."""
        return sum(plan.expert_bytes for plan in self.plans)

    @property
    def total_bytes(self) -> int:
        """The most that will be allocated on all GPUs together."""
        return sum(plan.total_bytes for plan in self.plans)


@dataclass(frozen=True)
class DivisionPlanner:
    """Divides a model.

    Raises:
        DeviceError: its chain cannot be cut so often.
    """

    bundle: Bundle
    targets: tuple[TargetRecord, ...]
    """Of each GPU, as the others."""
    options: CudaOptions
    limits: tuple[int, ...]
    speeds: tuple[CopySpeeds, ...]

    def __post_init__(self) -> None:
        most = len(cut_places(self.bundle.model)) + 1
        if len(self.limits) > most:
            encoder = self.bundle.model.encoder
            raise DeviceError(
                f"The model cannot be divided among {len(self.limits)} GPUs.",
                "Its decoder reads in every layer what its encoder writes, which stays on one GPU."
                if encoder
                else f"Its layers can be divided into {most} parts at most.",
                "Give one GPU." if most == 1 else f"Give {most} GPUs or fewer.",
            )

    @cached_property
    def chain(self) -> DividedChain:
        """What the cuts are chosen by."""
        model = self.bundle.model
        tables = [state_bytes((layer,)) - state_bytes(()) for layer in footprint(model).layers]
        return divided_chain(model, self.bundle.schedule.profile, self.options.max_batch, tables)

    def resident(self) -> DividedPlan | None:
        """With all experts; ``None`` where they do not fit.

        Raises:
            BudgetError: the model has no experts, and does not fit.
        """
        facts = footprint(self.bundle.model)
        if facts.dense_bytes + facts.experts_bytes <= sum(self.limits):
            plan = self._largest_step(lambda tokens: self._attempt(tokens, resident=True))
            if plan is not None:
                return plan
        if not self.bundle.model.experts:
            raise self._too_small()
        return None

    def offloaded(self, *, shared: bool) -> DividedPlan:
        """Each GPU with a cache of its layers' experts, or with all of them where its own fit.

        Args:
            shared: whether the CPU computes a share of those that are missing.

        Raises:
            BudgetError: a GPU or the host has too little memory.
        """
        plan = self._largest_step(lambda tokens: self._attempt(tokens, resident=False, shared=shared))
        if plan is None:
            raise self._too_small()
        return plan

    def _largest_step(self, attempt: Callable[[int], DividedPlan | None]) -> DividedPlan | None:
        """The first of the attempts, the largest step first, that leaves others room; else the last that fits."""
        fitting: DividedPlan | None = None
        for tokens in self._step_sizes():
            fitting = attempt(tokens) or fitting
            if fitting is not None and self._leaves_room(fitting):
                break
        return fitting

    def _step_sizes(self) -> list[int]:
        if self.options.max_step_tokens is not None:
            return [self.options.max_step_tokens]
        return step_sizes(self.options.max_batch, sequence_tokens(self.bundle.model))

    def _leaves_room(self, plan: DividedPlan) -> bool:
        """Whether steps take no more than their share of each GPU."""
        return all(each.needs.arena_bytes <= ARENA_SHARE * each.limit_bytes for each in plan.plans)

    def _attempt(self, tokens: int, *, resident: bool, shared: bool = False) -> DividedPlan | None:
        rooms = self._rooms(tokens, shared=shared)
        for pages in self._cache_pages(resident=resident):
            cuts = divide(self.chain, rooms, pages, resident=resident)
            if cuts is None:
                continue
            sections = sections_of(self.bundle, cuts)
            plans = self._plans(sections, tokens, pages, resident=resident, shared=shared)
            if plans is None:
                continue
            grown = min(self._full_pages, pages + min(map(_spare_pages, plans)))
            if resident and self.options.cache_tokens is None and grown > pages:
                plans = self._plans(sections, tokens, grown, resident=True, shared=False) or plans
            return DividedPlan(plans, sections)
        return None

    def _plans(
        self, sections: Sequence[Section], tokens: int, pages: int, *, resident: bool, shared: bool
    ) -> tuple[DevicePlan, ...] | None:
        """Exactly, GPU by GPU; ``None`` where one of them has too little memory."""
        options = dataclasses.replace(self.options, max_step_tokens=tokens, cache_tokens=pages * PAGE_TOKENS)
        experts = footprint(self.bundle.model).experts_bytes
        pinned = self._pinned_bytes(sections, tokens, shared=shared)
        plans: list[DevicePlan] = []
        for section, target, limit in zip(sections, self.targets, self.limits, strict=True):
            share = footprint(section.bundle.model).experts_bytes / max(1, experts)
            together = Together(sum(self.limits), share, pinned)
            planner = MemoryPlanner(section, target, options, limit, together)
            try:
                plan = planner.resident()
                if plan is None and not resident:
                    plan = planner.offloaded(shared=shared, fed=False)
            except BudgetError:
                plan = None
            if plan is None:
                return None
            plans.append(plan)
        return tuple(plans)

    @property
    def _full_pages(self) -> int:
        """Of as many full contexts as there may be sequences."""
        return self.options.max_batch * pages_for(sequence_tokens(self.bundle.model))

    def _cache_pages(self, *, resident: bool) -> Iterator[int]:
        """Pages of the cache to try, the most first."""
        if self.options.cache_tokens is not None:
            yield pages_for(self.options.cache_tokens)
            return
        page = max(1, footprint(self.bundle.model).cache_page_bytes)
        pages = self._full_pages if resident else min(self._full_pages, sum(self.limits) // 4 // page)
        while pages > 1:
            yield pages
            if not resident:
                return
            pages //= 2
        yield 1

    def _rooms(self, tokens: int, *, shared: bool) -> list[GpuRoom]:
        sharing = device_bytes(self.bundle.model, tokens) if shared else 0
        bandwidths = evened([speeds.bandwidth_gb_s for speeds in self.speeds])
        links = evened([speeds.link_gb_s for speeds in self.speeds])
        return [
            GpuRoom(limit - self._section_bytes(number, tokens) - sharing, bandwidth, link)
            for number, (limit, bandwidth, link) in enumerate(
                zip(self.limits, bandwidths, links, strict=True)
            )
        ]

    def _section_bytes(self, number: int, tokens: int) -> int:
        """About what a GPU needs whatever its steps: as for all of them, but for the tables of their experts."""
        needs = device_needs(
            whole_section(self.bundle),
            self.targets[number],
            max_batch=self.options.max_batch,
            max_step_tokens=tokens,
        )
        last = number == len(self.limits) - 1
        sampling = needs.sampler_bytes if last else routing_bytes(self.bundle.model, self.options.max_batch)
        return needs.arena_bytes + needs.staging_bytes + sampling + needs.code_bytes + state_bytes(())

    def _pinned_bytes(self, sections: Sequence[Section], tokens: int, *, shared: bool) -> int:
        """Of the host's memory beside experts: what is told each GPU in a step, and what goes from one to the next."""
        needs = device_needs(
            sections[0], self.targets[0], max_batch=self.options.max_batch, max_step_tokens=tokens
        )
        sharing = host_bytes(self.bundle.model, tokens) if shared else 0
        own = len(sections) * (needs.staging_bytes + BOUNCE_BYTES + sharing) - BOUNCE_BYTES
        return own + sum(carried_bytes(section, tokens) for section in sections)

    def _too_small(self) -> BudgetError:
        facts, tokens = footprint(self.bundle.model), self._step_sizes()[-1]
        each = max(self._section_bytes(number, tokens) for number in range(len(self.limits)))
        pages = pages_for(self.options.cache_tokens or 1)
        pages_bytes = exact_bytes(pages * facts.cache_page_bytes)
        return BudgetError(
            f"device_memory does not hold the model: {' and '.join(map(exact_bytes, self.limits))}.",
            f"Dense weights take {exact_bytes(facts.dense_bytes)}, the key-value cache {pages_bytes} for "
            f"{pages * PAGE_TOKENS} tokens, and each GPU needs {exact_bytes(each)} more for a step, tables, code and "
            "graphs.",
            "Raise device_memory, or lower cache_tokens, max_step_tokens or max_batch.",
        )


def _spare_pages(plan: DevicePlan) -> int:
    """Of the cache, for which a GPU has room left."""
    return (plan.limit_bytes - plan.total_bytes) // max(1, plan.needs.cache_page_bytes)


def carried_bytes(section: Section, tokens: int) -> int:
    """What a section leaves for the next one, in a step of so many tokens."""
    model = section.bundle.model
    return sum(padded_bytes(tokens * tensor_bytes(value_spec(model, name))) for name in section.leaving)
