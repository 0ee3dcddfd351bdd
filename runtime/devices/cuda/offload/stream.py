"""Steps of many tokens: the experts that have no slot pass through the stage, layer by layer, on the copy engine.

While one layer is computed the next ones' experts are on their way, as far as the stage reaches. Which experts will be
wanted is not known ahead: in a large step it is nearly all. In a smaller one the router is asked first, and where the
CPU computes a share of what is missing. What finds no room on the stage is read by the kernels where it is in host
memory.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moec.artifacts.steps import ExpertsStep
from moec.runtime.device import HostCall
from moec.runtime.devices.cuda.offload.ring import StageRing

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from moec.artifacts.model import ModelRecord
    from moec.runtime.device import Call, View
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.offload.files import FileExperts
    from moec.runtime.devices.cuda.offload.host_tier import HostTier
    from moec.runtime.devices.cuda.offload.layer_share import LayerShare
    from moec.runtime.devices.cuda.offload.slots import DeviceSlots
    from moec.runtime.devices.cuda.offload.stream_share import StreamShare
    from moec.runtime.experts.calls import ExpertWork
    from moec.runtime.stats import Stats

STATIC_SHARE = 0.9
"""Of a layer's experts: a step that is expected to choose so many streams all of them without asking."""


class _Copy(NamedTuple):
    """One expert on its way to the stage, or several that lie one behind the other there and here."""

    turn: int
    layer: int
    expert: int
    """The first."""
    source: int
    """In host memory; 0: in the file."""
    target: int
    size_bytes: int
    after: int
    """It may begin when this turn is over."""

    def with_next(self, other: _Copy) -> _Copy | None:
        """Both in one, where they are neighbours."""
        behind = self.source + self.size_bytes, self.target + self.size_bytes, self.turn, self.after
        if self.source == 0 or behind != (other.source, other.target, other.turn, other.after):
            return None
        return self._replace(size_bytes=self.size_bytes + other.size_bytes)


@dataclass(frozen=True)
class _Turn:
    """One layer of a streamed step."""

    layer: int
    number: int
    """Among the streamed layers of its part of the step."""
    asks: bool
    """Whether only chosen experts are brought."""
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    index: View
    share: LayerShare | None
    """The CPU's; ``None``: it has none."""


class LayerStream:
    """Makes the calls of large steps.

    Args:
        device: the GPU.
        model: its layers' order.
        slots: the slots, which such a step reads but does not change, and the stage.
        tier: experts in host memory.
        files: experts in files, or ``None`` where there are none.
    """

    def __init__(
        self,
        device: CudaDevice,
        model: ModelRecord,
        slots: DeviceSlots,
        tier: HostTier,
        files: FileExperts | None,
    ) -> None:
        self._device, self._driver, self._slots = device, device.driver, slots
        self._tier, self._files = tier, files
        self._parts = _parts(model)
        self._copies = device.resources.stream()
        count = len(slots.plan.layers)
        self._copied = [device.resources.event() for _ in range(count)]
        self._used = [device.resources.event() for _ in range(count)]
        self._queue: deque[_Copy] = deque()
        self._awaited = -1
        self._residents: list[NDArray[np.int64]] = []
        self._ring = StageRing(slots.plan.stage_bytes)
        self._led: dict[int, int] = {}
        """Experts of the layer at work that were copied before its router had spoken, and where they are."""
        self._counts = {"hits": 0, "misses": 0, "cpu_misses": 0, "bytes_moved": 0}
        self.settle: Callable[[], None] = device.synchronize
        """Waits until nobody else writes to the stage."""
        self.share: StreamShare | None = None
        """The CPU's; ``None``: it has none. No call may have been made before it is set."""
        device.unfinished.repair_with(lambda: self._driver.synchronize(self._copies))

    def takes(self, layer: int, tokens: int) -> bool:
        """Whether a step of so many tokens is streamed."""
        return self._slots.plan.is_streamed(layer, tokens)

    def call(self, work: ExpertWork) -> Call:
        """The call of one layer."""
        layer, (hidden, index, weight, out) = work.layer, work.views
        table = self._slots.states.stream_table(layer)
        tensors = map(self._device.tensor, (hidden, index, weight, table, *work.workspace, out))
        tokens = index.shape[0]
        part = next(part for part in self._parts if layer in part)
        layers = [other for other in part if self.takes(other, tokens)]
        asks = any(self._asks(other, tokens) or self._shares(other, tokens) for other in layers)
        share = self.share.layer(work) if self.share and self._shares(layer, tokens) else None
        turn = _Turn(layer, layers.index(layer), asks, work.function, tuple(tensors), index, share)
        return HostCall("experts", lambda: self._run(turn, layers))

    def count(self, stats: Stats) -> None:
        """Add what was streamed since the last time."""
        for name, more in self._counts.items():
            setattr(stats, name, getattr(stats, name) + more)
            self._counts[name] = 0

    def _asks(self, layer: int, tokens: int) -> bool:
        own = self._slots.plan.layers[layer]
        return expected_share(own.experts, own.top_k, tokens) < STATIC_SHARE

    def _shares(self, layer: int, tokens: int) -> bool:
        return self.share is not None and self.share.takes(layer, tokens)

    def _run(self, turn: _Turn, layers: list[int]) -> None:
        driver, device = self._driver, self._device
        if turn.number == 0:
            self._begin()
            if not turn.asks:
                self._plan(layers, 0, None)
        share = self._ask(turn) if turn.asks else None
        self._led.clear()
        for following in layers[turn.number + 1 : turn.number + 2]:
            if turn.share is not None and not self._asks(following, turn.index.shape[0]):
                self._lead(turn.number + 1, following, turn.share.lead)
        self._issue(turn.number - 1)
        assert not self._queue or self._queue[0].turn > turn.number, "the stage was planned wrongly"
        hidden, index, *others = turn.arguments
        driver.wait_in(device.stream, self._copied[turn.number])
        turn.function(hidden, index if share is None else share.own, *others)
        driver.record(self._used[turn.number], device.stream)
        self._issue(turn.number)
        if share is not None:
            share.compute()

    def _begin(self) -> None:
        """Look who has a slot, when all that came before is over, so that the stage is free."""
        self.settle()
        self._queue.clear()
        self._led.clear()
        self._ring = StageRing(self._slots.plan.stage_bytes)
        self._awaited = -1
        self._residents = self._slots.states.residents()

    def _ask(self, turn: _Turn) -> LayerShare | None:
        """Read the router's choices, and divide what is missing; the CPU's share, where it has anything to compute."""
        index, experts = self._device.read(turn.index), self._slots.plan.layers[turn.layer].experts
        tokens = np.bincount(index[(index >= 0) & (index < experts)], minlength=experts)
        theirs = np.zeros(experts, np.bool_)
        if turn.share is not None:
            free = self._hosted(turn.layer) & (tokens > 0)
            free[list(self._led)] = False
            theirs[turn.share.divide(tokens, np.flatnonzero(free))] = True
        self._plan([turn.layer], turn.number, np.flatnonzero((tokens > 0) & ~theirs))
        by_cpu = int(np.count_nonzero(theirs))
        self._counts["misses"] += by_cpu
        self._counts["cpu_misses"] += by_cpu
        if turn.share is None or not by_cpu:
            return None
        turn.share.send(index, theirs)
        return turn.share

    def _hosted(self, layer: int) -> NDArray[np.bool_]:
        """Which experts have no slot and are in host memory ``[E]``."""
        return np.asarray((self._residents[layer] < 0) & (self._tier.homes[layer] != 0))

    def _lead(self, turn: int, layer: int, most: int) -> None:
        """Queue the copies of a layer's most used experts, so that the link need not wait for its router."""
        order = np.array(self._slots.plan.layers[layer].order)
        for expert in order[self._hosted(layer)[order]][:most].tolist():
            target = self._bring(turn, layer, expert)
            if target is not None:
                self._led[expert] = target

    def _plan(self, layers: list[int], first: int, chosen: NDArray[np.int64] | None) -> None:
        """Say where layers find their experts, and queue the copies of what is missing."""
        start = self._slots.states.stream_table(layers[0]).address
        end = self._slots.states.stream_table(layers[-1])
        image = np.zeros((end.address - start) // 8 + end.shape[0], np.int64)
        for turn, layer in enumerate(layers, first):
            view = self._slots.states.stream_table(layer)
            place = (view.address - start) // 8
            image[place : place + view.shape[0]] = self._table(turn, layer, chosen)
        self._device.write(start, image)

    def _table(self, turn: int, layer: int, chosen: NDArray[np.int64] | None) -> NDArray[np.int64]:
        """Addresses of a layer's experts ``[E]``."""
        own, slots = self._slots.plan.layers[layer], self._residents[layer]
        homes = self._tier.homes[layer]
        first = self._slots.slot_addresses[layer]
        table: NDArray[np.int64] = np.where(slots >= 0, first + slots * own.stride_bytes, homes)
        wanted = np.arange(own.experts) if chosen is None else chosen
        missing = wanted[slots[wanted] < 0]
        self._counts["hits"] += len(wanted) - len(missing)
        table[list(self._led)] = list(self._led.values())
        missing = missing[~np.isin(missing, list(self._led))]
        # Those in the file have to be copied, others need not.
        for expert in missing[np.argsort(homes[missing] != 0, kind="stable")].tolist():
            target = self._bring(turn, layer, expert)
            if target is not None:
                table[expert] = target
        return table

    def _bring(self, turn: int, layer: int, expert: int) -> int | None:
        """Queue the copy of a missing expert; where it goes, ``None`` where the kernels read host memory instead."""
        size, home = self._slots.plan.layers[layer].stride_bytes, int(self._tier.homes[layer][expert])
        self._counts["misses"] += 1
        self._counts["bytes_moved"] += size
        room = self._ring.take(size, turn)
        if room is None:
            assert home != 0, "the stage does not hold the experts that are only in the file"
            return None
        target = self._slots.stage_address + room.offset
        self._enqueue(_Copy(turn, layer, expert, home, target, size, room.after))
        return target

    def _enqueue(self, copy: _Copy) -> None:
        both = self._queue[-1].with_next(copy) if self._queue else None
        if both is not None:
            self._queue.pop()
        self._queue.append(both or copy)

    def _issue(self, done: int) -> None:
        """Put copies into their stream whose places are free once turn ``done`` is over, or were all along."""
        driver = self._driver
        while self._queue and self._queue[0].after <= done:
            copy = self._queue.popleft()
            if copy.after > self._awaited:
                driver.wait_in(self._copies, self._used[copy.after])
                self._awaited = copy.after
            source = copy.source
            if source == 0:
                assert self._files is not None
                source = self._files.read_ahead(copy.layer, copy.expert)
            driver.copy_in(copy.target, source, copy.size_bytes, self._copies)
            if copy.source == 0 and self._files is not None:
                self._files.sent(self._copies)
            if not self._queue or self._queue[0].turn != copy.turn or self._queue[0].after > done:
                driver.record(self._copied[copy.turn], self._copies)


def _parts(model: ModelRecord) -> list[list[int]]:
    """The MoE layers of an encoder, those on all tokens of a step, and those on the rows whose logits are wanted."""
    parts = (model.encoder, model.steps[: model.last_step], model.steps[model.last_step :])
    return [[step.layer for step in part if isinstance(step, ExpertsStep)] for part in parts]


def expected_share(experts: int, top_k: int, tokens: int) -> float:
    """Share of a layer's experts that ``tokens`` tokens choose, of uniform routing."""
    return 1 - (1 - top_k / experts) ** tokens
