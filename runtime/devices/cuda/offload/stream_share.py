"""The CPU's share of steps of many tokens: while the copy engine brings missing experts, it computes others of them.

The bundle's own function for the CPU does it, in the host's thread and its pool; rows and choices go through pinned
memory. Both ways' speeds are measured when the model is loaded, so that one load always divides alike.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.sharing import COPY_US, HANDING_US, MOST_SHARED_TOKENS, ManySpeeds, worth_asking
from moec.artifacts.words import mailbox
from moec.artifacts.words.mailbox import collect_name
from moec.runtime.device import View, padded_bytes, view_bytes
from moec.runtime.devices.cuda.driver.memory import PinnedMemory
from moec.runtime.devices.cuda.offload.layer_share import HostRows, LayerShare
from moec.runtime.sharing.many import rehearse_many
from moec.runtime.tensors import aligned_empty, array_at, tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from moec.artifacts.model import ModelRecord
    from moec.runtime.device import Functions
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.offload.host_tier import HostTier
    from moec.runtime.devices.cuda.offload.slots import DeviceSlots
    from moec.runtime.experts.calls import ExpertWork

LEAD_US = 600.0
"""Of the link from one layer's last copy to the next one's first, where it waited for the next router: so long it
brings experts of the next layer that are nearly sure to be chosen."""
MOST_LEAD = 0.25
"""Of a layer's missing experts."""


class StreamShare:
    """Says which layers the CPU has a share of.

    Args:
        device: the GPU.
        functions: of the GPU's module.
        experts: ``experts_<body>`` of the CPU's module.
        model: its MoE layers.
        tier: the experts in host memory; the others are not the CPU's.
        slots: of its layers, and the stage.
        link_gb_s: of copies to the GPU.
        step_tokens: of the largest step.

    Raises:
        BudgetError: there is no memory for it.
        BundleError: the GPU's module has no ``collect_<body>``.
    """

    def __init__(
        self,
        device: CudaDevice,
        functions: Functions,
        experts: Mapping[str, Callable[..., Any]],
        model: ModelRecord,
        tier: HostTier,
        slots: DeviceSlots,
        link_gb_s: float,
        step_tokens: int,
    ) -> None:
        self._device, self._plan, self._link_gb_s = device, slots.plan, link_gb_s
        self._most = min(step_tokens, MOST_SHARED_TOKENS)
        self._bodies = [layer.body for layer in model.experts]
        self._hidden = {body.name: body.hidden for body in model.bodies}
        self._experts = experts
        self._collect = {body.name: functions.get(collect_name(body.name)) for body in model.bodies}
        sizes = _sizes(model, step_tokens)
        starts = np.cumsum([0, *sizes.values()]).tolist()
        self._memory = PinnedMemory(device.resources, starts[-1])
        self._places = dict(zip(sizes, starts, strict=False))
        self._own = device.allocate(sizes["own"])
        self._answered = device.hold(_answered())
        self._there = device.resources.event()
        self._tables = [aligned_empty(homes.shape, np.int64) for homes in tier.homes]
        for table, homes in zip(self._tables, tier.homes, strict=True):
            table[:] = homes
        self._times = self._rehearse(slots.stage_address)

    def takes(self, layer: int, tokens: int) -> bool:
        """Whether the CPU is to have a share of a layer in a step of so many tokens, as many for each expert."""
        own = self._plan.layers[layer]
        if tokens > self._most or self._bodies[layer] not in self._times:
            return False
        speeds, each = self._speeds(layer, tokens), tokens * own.top_k / own.experts
        return worth_asking(speeds, each, self._missing(layer), self._lead(layer, speeds))

    def layer(self, work: ExpertWork) -> LayerShare:
        """The share of a layer that `takes` its tokens."""
        hidden, index, weight, out = work.views
        host, speeds = self._host(work.layer, index.shape[0]), self._speeds(work.layer, index.shape[0])
        sent = View(self._answered.address, "int64", (mailbox.SENT_WORDS,))
        words = View(sent.address + padded_bytes(view_bytes(sent)), "int64", (mailbox.WORDS,))
        sums = View(host.address("out"), "float32", (host.arrays["out"].size,))
        collect = self._collect[self._bodies[work.layer]]
        return LayerShare(
            self._device,
            self._there,
            host,
            {"x": hidden, "weight": weight},
            index._replace(address=self._own.address),
            speeds,
            self._lead(work.layer, speeds),
            partial(collect, *map(self._device.tensor, (out, sent, words, sums))),
        )

    def _lead(self, layer: int, speeds: ManySpeeds) -> int:
        return int(min(LEAD_US / speeds.link_us, MOST_LEAD * self._missing(layer)))

    def _missing(self, layer: int) -> int:
        """Experts in host memory without a slot."""
        own = self._plan.layers[layer]
        return max(0, own.hosted - own.slots)

    def _speeds(self, layer: int, tokens: int) -> ManySpeeds:
        body = self._bodies[layer]
        link_us = self._plan.layers[layer].stride_bytes / self._link_gb_s / 1e3 + COPY_US
        rows_us = 2 * 4 * tokens * self._hidden[body] / self._link_gb_s / 1e3
        return ManySpeeds(link_us, *self._times[body], HANDING_US + rows_us)

    def _host(self, layer: int, tokens: int) -> HostRows:
        body = self._bodies[layer]
        rows, pairs = (tokens, self._hidden[body]), (tokens, self._plan.layers[layer].top_k)
        kinds = {
            "x": (np.float32, rows),
            "out": (np.float32, rows),
            "weight": (np.float32, pairs),
            "index": (np.int64, pairs),
            "own": (np.int64, pairs),
        }
        arrays = {name: array_at(self._memory.address + self._places[name], *kinds[name]) for name in kinds}
        order = (*(arrays[name] for name in ("x", "index", "weight")), self._tables[layer], arrays["out"])
        return HostRows(arrays, self._experts[body], tuple(map(tensor_of, order)))

    def _rehearse(self, stage: int) -> dict[str, tuple[tuple[int, ...], tuple[float, ...]]]:
        """Of each body, by a layer: numbers of tokens, and microseconds of an expert with so many."""
        found: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {}
        random = np.random.default_rng(0)
        for number, (body, table) in enumerate(zip(self._bodies, self._tables, strict=True)):
            known = np.flatnonzero(table).tolist()
            if known and body in self._experts and body not in found:
                prepare = partial(self._rehearsal, number, stage, random)
                times = rehearse_many(prepare, self._plan.layers[number].top_k, known, self._most)
                if times[0]:
                    found[body] = times
        return found

    def _rehearsal(
        self,
        layer: int,
        stage: int,
        random: np.random.Generator,
        index: NDArray[np.int64],
        link_seconds: float,
    ) -> Callable[[], None]:
        """What computes rows with these choices ``[T, K]``, while the link is busy for so long."""
        host, device = self._host(layer, len(index)), self._device
        host.arrays["x"][:] = random.standard_normal(host.arrays["x"].shape)
        host.arrays["weight"][:], host.arrays["index"][:] = 1, index
        device.synchronize()
        size, homes = self._plan.layers[layer].stride_bytes, self._tables[layer]
        if self._plan.stage_bytes >= size:
            for home in np.resize(homes[homes != 0], round(link_seconds * self._link_gb_s * 1e9 / size)):
                device.copy_in(stage, int(home), size)
        return host.compute


def device_bytes(model: ModelRecord, step_tokens: int) -> int:
    """Of the GPU's memory that a share of streamed steps takes."""
    return _sizes(model, step_tokens)["own"] + padded_bytes(_answered().nbytes)


def host_bytes(model: ModelRecord, step_tokens: int) -> int:
    """Of host memory that it takes, pinned or not."""
    return sum(_sizes(model, step_tokens).values()) + sum(8 * layer.experts for layer in model.experts)


def _sizes(model: ModelRecord, step_tokens: int) -> dict[str, int]:
    """Bytes of pinned memory by what is in it."""
    tokens = min(step_tokens, MOST_SHARED_TOKENS)
    rows = padded_bytes(4 * tokens * max(body.hidden for body in model.bodies))
    pairs = tokens * max(layer.top_k for layer in model.experts)
    choices = padded_bytes(8 * pairs)
    return {"x": rows, "out": rows, "weight": padded_bytes(4 * pairs), "index": choices, "own": choices}


def _answered() -> NDArray[np.int64]:
    """The notes and words of a mailbox whose only request is answered."""
    first = padded_bytes(8 * mailbox.SENT_WORDS) // 8
    image = np.zeros(first + mailbox.WORDS, np.int64)
    image[[mailbox.SENT, mailbox.PENDING, first + mailbox.DONE]] = 1
    return image
