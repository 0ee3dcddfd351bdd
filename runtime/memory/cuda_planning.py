"""How a GPU's memory is divided: all experts on it where they fit beside the rest, otherwise as many as do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.artifacts.layout.cache import sequence_tokens
from moec.artifacts.sizes import exact_bytes, human_bytes
from moec.errors import BudgetError
from moec.runtime.devices.cuda.device import BOUNCE_BYTES
from moec.runtime.devices.cuda.offload import feeding
from moec.runtime.devices.cuda.offload.helping import device_bytes, host_bytes
from moec.runtime.machine.limits import available_memory, total_memory
from moec.runtime.memory.budget import parse_memory
from moec.runtime.memory.device_budget import (
    DeviceNeeds,
    DevicePlan,
    device_needs,
    plan_device_memory,
    plan_offload,
)
from moec.runtime.memory.step_tokens import plan_largest_step, plan_offloaded_step

if TYPE_CHECKING:
    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.files.manifest import TargetRecord
    from moec.artifacts.files.verify import Level
    from moec.artifacts.sections import Section

HEADROOM_BYTES = 256 << 20
"""Of a GPU's free memory, left alone where no budget is given: its context grows while kernels are loaded."""

HOST_SHARE = 0.9
"""Of the memory that the host has available, at most, is for experts where no budget is given."""


@dataclass(frozen=True)
class CudaOptions:
    """What `moec.runtime.load` was told, checked."""

    ordinals: tuple[int, ...]
    """The GPUs, in the order in which they follow each other."""
    device_memory: tuple[int | float | str | None, ...]
    """Of each GPU."""
    host_memory: int | float | str | None
    cpu_threads: int | None
    max_batch: int
    max_step_tokens: int | None
    """``None``: as many as memory allows, within reason."""
    cache_tokens: int | None
    prefetch: bool | None
    """Bring experts before their router has spoken; ``None``: as the schedule says."""
    copy_thread: bool | None
    """Feed the copy engine with missing experts; ``None``: where the CPU's threads have nothing better to do."""
    prefix_caching: bool | None
    """Let prompts begin with pages that are in the cache; ``None``: where the model can."""
    verify: Level


@dataclass(frozen=True)
class Together:
    """What all GPUs of a model have together, where there are several."""

    limit_bytes: int
    """Their budgets."""
    host_share: float
    """The part of the host's memory that is for the experts of one of them."""
    pinned_bytes: int
    """Of the host's memory that all of them need beside experts."""


@dataclass(frozen=True)
class MemoryPlanner:
    """Plans a GPU's memory, with the step that was asked for or the largest that leaves the others room."""

    section: Section
    """What the GPU runs."""
    target: TargetRecord
    options: CudaOptions
    limit_bytes: int
    together: Together | None = None
    """``None``: it is the only GPU."""

    @property
    def bundle(self) -> Bundle:
        """What the GPU runs, as a bundle."""
        return self.section.bundle

    def resident(self) -> DevicePlan | None:
        """With all experts; ``None`` where they do not fit.

        Raises:
            BudgetError: the model has no experts, and does not fit.
        """
        step_tokens, max_batch = self.options.max_step_tokens, self.options.max_batch
        try:
            if step_tokens is not None:
                return self._resident(step_tokens)
            return plan_largest_step(
                self._resident,
                max_batch=max_batch,
                max_context=sequence_tokens(self.bundle.model),
                cache_tokens=self.options.cache_tokens,
            )
        except BudgetError:
            if not self.bundle.model.experts:
                raise
        return None

    def offloaded(self, *, shared: bool, fed: bool) -> DevicePlan:
        """With a cache of experts.

        Args:
            shared: whether the CPU computes a share of those that are missing.
            fed: whether a thread of it feeds the copy engine besides.

        Raises:
            BudgetError: the GPU or the host has too little memory.
        """
        step_tokens, max_batch = self.options.max_step_tokens, self.options.max_batch
        if step_tokens is not None:
            return self._offloaded(step_tokens, shared, fed)
        return plan_offloaded_step(
            lambda tokens: self._offloaded(tokens, shared, fed),
            max_batch=max_batch,
            max_context=sequence_tokens(self.bundle.model),
        )

    def _needs(self, step_tokens: int) -> DeviceNeeds:
        return device_needs(
            self.section, self.target, max_batch=self.options.max_batch, max_step_tokens=step_tokens
        )

    def _resident(self, step_tokens: int) -> DevicePlan:
        return plan_device_memory(
            self._needs(step_tokens),
            max_context=sequence_tokens(self.bundle.model),
            limit_bytes=self.limit_bytes,
            cache_tokens=self.options.cache_tokens,
            max_batch=self.options.max_batch,
        )

    def _offloaded(self, step_tokens: int, shared: bool, fed: bool) -> DevicePlan:
        needs, model = self._needs(step_tokens), self.bundle.model
        together, pinned, share = self.together, needs.staging_bytes, 0
        if shared:
            pinned += host_bytes(model, step_tokens)
            share += device_bytes(model, step_tokens)
        if fed:
            pinned, share = pinned + feeding.HOST_BYTES, share + feeding.DEVICE_BYTES
        room = _host_room(self.options.host_memory, pinned if together is None else together.pinned_bytes)
        return plan_offload(
            self.bundle,
            needs,
            limit_bytes=self.limit_bytes,
            host_bytes=room if together is None else int(room * together.host_share),
            share_bytes=share,
            prefetch=self.options.prefetch,
            schedule_bytes=None if together is None else (together.limit_bytes, room),
            cache_tokens=self.options.cache_tokens,
            max_batch=self.options.max_batch,
        )


def device_limit(device_memory: int | float | str | None, free: int, total: int) -> int:
    """The budget in bytes, held against what is free.

    Raises:
        BudgetError: there is not so much free.
    """
    if device_memory is None:
        return max(0, free - HEADROOM_BYTES)
    limit = parse_memory(device_memory, total, "device_memory")
    if limit > free:
        raise BudgetError(
            f"device_memory is {human_bytes(limit)}, and {human_bytes(limit - free)} of them are not free.",
            f"The GPU has {human_bytes(total)}, of which {exact_bytes(free)} are free; others may use the same GPU.",
            "Lower device_memory, or end other programs on the GPU.",
        )
    return limit


def _host_room(host_memory: int | float | str | None, pinned_bytes: int) -> int:
    """Bytes for experts in host memory, beside the pinned memory that every model has."""
    if host_memory is None:
        limit = int(available_memory() * HOST_SHARE)
    else:
        limit = parse_memory(host_memory, total_memory(), "host_memory")
    return max(0, limit - pinned_bytes - BOUNCE_BYTES)
