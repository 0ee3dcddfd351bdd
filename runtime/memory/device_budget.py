"""What a model will take on a GPU, held against the budget before anything is allocated. Pure arithmetic."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.dense_runs import dense_runs
from moec.artifacts.layout.cache import PAGE_TOKENS, sequence_tokens
from moec.artifacts.layout.footprint import GRAPH_BYTES, LOGIT_ROWS, TABLE_ENTRY_BYTES, footprint
from moec.artifacts.paths import experts_name
from moec.artifacts.schedule import DEFAULT_POLICY, best_schedule
from moec.artifacts.sizes import exact_bytes, human_bytes
from moec.artifacts.words.sampling import OPTION_WORDS
from moec.errors import BudgetError
from moec.runtime.chain.arena import plan_arena
from moec.runtime.chain.layout import chain_layout
from moec.runtime.device import ALIGNMENT_BYTES, padded_bytes
from moec.runtime.devices.cuda.routing_log import routing_bytes
from moec.runtime.devices.cuda.sampling import sampler_bytes
from moec.runtime.engine.batch import told_names
from moec.runtime.engine.pages import pages_for, table_rows
from moec.runtime.experts.ahead import AheadPlan, plan_ahead
from moec.runtime.experts.slots import plan_slots, state_bytes

if TYPE_CHECKING:
    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.files.manifest import TargetRecord
    from moec.artifacts.sections import Section
from moec.runtime.experts.slots import SlotPlan


@dataclass(frozen=True)
class DeviceNeeds:
    """What does not depend on how long the cache is."""

    dense_bytes: int
    expert_bytes: int
    """All routed experts."""
    table_bytes: int
    """Addresses of the experts."""
    state_bytes: int
    """The states of all sequences at once, where layers have some."""
    arena_bytes: int
    """Values of the largest step, workspaces included."""
    staging_bytes: int
    """Tokens and page tables of a step."""
    sampler_bytes: int
    """Choosing tokens on the GPU, and the routing of a decoding step for whoever records it."""
    code_bytes: int
    """Machine code, an upper bound, and graphs."""
    cache_page_bytes: int
    """One page in all attention layers."""
    step_tokens: int
    """Tokens of the largest step."""

    @property
    def fixed_bytes(self) -> int:
        """Everything but the cache."""
        return (
            self.dense_bytes
            + self.expert_bytes
            + self.table_bytes
            + self.state_bytes
            + self.arena_bytes
            + self.staging_bytes
            + self.sampler_bytes
            + self.code_bytes
        )


@dataclass(frozen=True)
class DevicePlan:
    """Bytes on the GPU by purpose; within the budget. The driver's own context is not counted."""

    needs: DeviceNeeds
    cache_pages: int
    limit_bytes: int
    slots: SlotPlan | None = None
    """Where the experts are; ``None``: all on the GPU."""
    ahead: AheadPlan | None = None
    """What is brought before a router has spoken; ``None``: nothing."""

    @property
    def cache_bytes(self) -> int:
        """The key-value cache."""
        return _aligned(self.cache_pages * self.needs.cache_page_bytes)

    @property
    def dense_bytes(self) -> int:
        """All weights outside routed experts."""
        return self.needs.dense_bytes

    @property
    def expert_bytes(self) -> int:
        """All routed experts, or what there is for them."""
        return self.needs.expert_bytes

    @property
    def total_bytes(self) -> int:
        """The most that will be allocated."""
        return self.needs.fixed_bytes + self.cache_bytes


def device_needs(
    section: Section, target: TargetRecord, *, max_batch: int, max_step_tokens: int
) -> DeviceNeeds:
    """Add up what a section of a chain, or all of it, needs with all its experts on the GPU."""
    bundle, last = section.bundle, not section.leaving
    model, files, facts = bundle.model, bundle.manifest.files, footprint(bundle.model)
    layout = chain_layout(
        model,
        bundle.programs[target.name],
        max_step_tokens,
        min(max_step_tokens, LOGIT_ROWS),
        section.arriving,
        section.leaving,
    )
    code = [files[name].size_bytes for name in target.files if name.endswith(".fatbin")]
    return DeviceNeeds(
        dense_bytes=_aligned(dense_runs(section).size_bytes),
        expert_bytes=sum(_aligned(files[experts_name(layer.layer)].size_bytes) for layer in model.experts),
        table_bytes=sum(_aligned(TABLE_ENTRY_BYTES * layer.experts) for layer in model.experts),
        state_bytes=_aligned(facts.states_bytes(max_batch)) if model.states else 0,
        arena_bytes=_aligned(plan_arena(layout.lifetimes).size_bytes),
        staging_bytes=staging_bytes(
            max_batch, max_step_tokens, model.max_context, sources=bool(model.encoder)
        ),
        sampler_bytes=(sampler_bytes(model.vocab_size, max_batch) if last else 0)
        + routing_bytes(model, max_batch),
        code_bytes=sum(code) + GRAPH_BYTES,
        cache_page_bytes=facts.cache_page_bytes,
        step_tokens=max_step_tokens,
    )


def staging_bytes(max_batch: int, max_step_tokens: int, max_context: int, *, sources: bool = False) -> int:
    """The arrays of a `moec.runtime.engine.batch.StepBatch` and the sampler's options, each in its own place."""
    table = 4 * table_rows(max_batch, sources=sources) * pages_for(max_context)
    options = 4 * OPTION_WORDS * max_batch
    each = (8, 8, *(4 for _ in told_names(sources=sources)))
    return sum(_aligned(size * max_step_tokens) for size in each) + _aligned(table) + _aligned(options)


def plan_device_memory(
    needs: DeviceNeeds,
    *,
    max_context: int,
    limit_bytes: int,
    cache_tokens: int | None,
    max_batch: int,
) -> DevicePlan:
    """Give the cache its share.

    Args:
        needs: everything else.
        max_context: tokens of one sequence, its source among them.
        limit_bytes: the budget, or what is free where there is none.
        cache_tokens: tokens of key-value cache, all sequences together; ``None``: ``max_batch`` full contexts, or
            what the rest of the limit holds.
        max_batch: sequences at once.

    Raises:
        BudgetError: the limit does not hold the weights, a step and the cache.
    """
    page = needs.cache_page_bytes
    if cache_tokens is None:
        room = (limit_bytes - needs.fixed_bytes - ALIGNMENT_BYTES) // max(1, page)
        pages = max(1, min(max_batch * pages_for(max_context), room))
    else:
        pages = pages_for(cache_tokens)
    plan = DevicePlan(needs, pages, limit_bytes)
    if plan.total_bytes > limit_bytes:
        raise _too_small(plan)
    return plan


def plan_offload(
    bundle: Bundle,
    resident: DeviceNeeds,
    *,
    limit_bytes: int,
    host_bytes: int,
    share_bytes: int = 0,
    prefetch: bool | None = None,
    schedule_bytes: tuple[int, int] | None = None,
    cache_tokens: int | None,
    max_batch: int,
) -> DevicePlan:
    """Divide the GPU's memory where it does not hold all experts.

    Args:
        bundle: its profile says what each slot is worth; a schedule that fits who leaves, and which steps stream.
        resident: what a model with all its experts needs.
        limit_bytes: the budget.
        host_bytes: room for experts in host memory.
        share_bytes: of the GPU's memory that the CPU's threads take for what they share with it.
        prefetch: whether experts are brought ahead; ``None``: where the schedule says so and the budget has room.
        schedule_bytes: budgets of GPUs and host that a schedule is chosen by; ``None``: the two above.
        cache_tokens: tokens of key-value cache, all sequences together; ``None``: ``max_batch`` full contexts, but no
            more than a quarter of the limit.
        max_batch: sequences at once.

    Raises:
        BudgetError: the limit does not even hold what is no expert, or host memory not the experts of one step.
        RequestError: experts are to be brought ahead, and there is nothing to guess by.
    """
    facts, schedules = footprint(bundle.model), bundle.schedule.schedules
    base = dataclasses.replace(resident, expert_bytes=0, table_bytes=state_bytes(facts.layers) + share_bytes)
    if cache_tokens is None:
        full = max_batch * pages_for(sequence_tokens(bundle.model))
        quarter = limit_bytes // 4 // max(1, base.cache_page_bytes)
        cache_tokens = PAGE_TOKENS * max(1, min(full, quarter))
    schedule = best_schedule(schedules, *(schedule_bytes or (limit_bytes, host_bytes)))
    ahead = plan_ahead(bundle, facts, schedule, prefetch)

    def planned(base: DeviceNeeds) -> DevicePlan:
        return plan_device_memory(
            base,
            max_context=sequence_tokens(bundle.model),
            limit_bytes=limit_bytes,
            cache_tokens=cache_tokens,
            max_batch=max_batch,
        )

    plan = planned(base)
    if ahead is not None:
        if prefetch is None and ahead.size_bytes > limit_bytes - plan.total_bytes:
            ahead = None
        else:
            base = dataclasses.replace(base, table_bytes=base.table_bytes + ahead.size_bytes)
            plan = planned(base)
    slots = plan_slots(
        facts.layers,
        bundle.schedule.profile,
        DEFAULT_POLICY if schedule is None else schedule.policy,
        None if schedule is None else schedule.prefill.streamed_from_tokens,
        device_bytes=limit_bytes - plan.total_bytes,
        host_bytes=host_bytes,
        max_batch=max_batch,
    )
    needs = dataclasses.replace(base, expert_bytes=slots.slot_bytes + slots.stage_bytes)
    return DevicePlan(needs, plan.cache_pages, limit_bytes, slots, ahead)


def _too_small(plan: DevicePlan) -> BudgetError:
    needs = plan.needs
    small = needs.table_bytes + needs.staging_bytes + needs.sampler_bytes
    return BudgetError(
        f"device_memory is {exact_bytes(plan.total_bytes - plan.limit_bytes)} too small: "
        f"it must be {exact_bytes(plan.total_bytes)} at least.",
        f"Dense weights take {human_bytes(needs.dense_bytes)}, routed experts {human_bytes(needs.expert_bytes)}, the "
        f"key-value cache {human_bytes(plan.cache_bytes)} for {plan.cache_pages * PAGE_TOKENS} tokens, states of "
        f"sequences {human_bytes(needs.state_bytes)}, a step {human_bytes(needs.arena_bytes)}, "
        f"tables, staging and sampling {human_bytes(small)}, code and graphs {human_bytes(needs.code_bytes)}.",
        "Raise device_memory, or lower cache_tokens, max_step_tokens or max_batch.",
    )


def _aligned(size: int) -> int:
    return max(ALIGNMENT_BYTES, padded_bytes(size))
