"""What the GPU knows of the experts of each MoE layer, in one block of its memory: ``artifacts.words.slots``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.words import slots as words
from moec.planning.policies import half_life_shift, initial_state
from moec.runtime.device import View
from moec.runtime.experts.slots import padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moec.artifacts.schedule import Policy
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.experts.slots import LayerSlots, SlotPlan

COUNTERS = (words.HITS, words.MISSES, words.CPU_MISSES, words.EVICTIONS, words.AHEAD_BYTES)


@dataclass(frozen=True)
class Places:
    """Addresses that a layer's state begins with."""

    slots: int
    """Of its first slot."""
    stage: int
    stage_places: int
    homes: NDArray[np.int64]
    """``[E]``: where each expert is in host memory, 0: nowhere."""


class LayerStates:
    """The states of all MoE layers, the tables of streamed steps, and two tensors for the choices of a layer.

    Args:
        device: the GPU.
        plan: who has how many slots; they are taken to be filled in the layers' orders.
        places: of each layer.
    """

    def __init__(self, device: CudaDevice, plan: SlotPlan, places: Sequence[Places]) -> None:
        self._device = device
        self._layers = [words.state_words(layer.experts, layer.experts) for layer in plan.layers]
        self._slots = [layer.slots for layer in plan.layers]
        self._experts = [layer.experts for layer in plan.layers]
        sizes = [part.size for part in self._layers]
        self._firsts = np.cumsum([0, *sizes]).tolist()
        tables = [padded(layer.experts) for layer in plan.layers]
        self.table_firsts = (self._firsts[-1] + np.cumsum([0, *tables])).tolist()
        """First word of each layer's table of streamed steps."""
        total = self.table_firsts[-1] + 2 * words.MOST_ENTRIES
        image = np.zeros(total, np.int64)
        for number, (layer, own) in enumerate(zip(plan.layers, places, strict=True)):
            first, last = self._firsts[number : number + 2]
            fill_state(image[first:last], layer, plan.policy, own)
        self._first = image
        self._memory = device.hold(image)

    def state(self, layer: int) -> View:
        """int64 ``[W]``."""
        return self._view(self._firsts[layer], self._layers[layer].size)

    def table(self, layer: int) -> View:
        """int64 ``[E]``: where a step of few tokens finds its experts."""
        return self._view(self._firsts[layer] + words.TABLE, self._experts[layer])

    def stream_table(self, layer: int) -> View:
        """int64 ``[E]``: where a streamed step finds them."""
        return self._view(self.table_firsts[layer], self._experts[layer])

    def set_shares(self, layer: int, shares: Sequence[int], worth: int) -> None:
        """Say how many of 0, 1, 2 ... missing experts of a layer are the CPU's; ``MOST_SHARED + 1`` numbers.

        Args:
            layer: its ordinal.
            shares: of the CPU.
            worth: when one is fetched nevertheless, see `moec.planning.policies.divided`.
        """
        assert len(shares) == words.MOST_SHARED + 1
        self._set(self._firsts[layer] + words.SHARE, (*shares, worth))

    def set_notes(self, address: int) -> None:
        """Say where the GPU keeps its notes of orders."""
        for first in self._firsts[:-1]:
            self._set(first + words.NOTES, (address,))

    def restart(self) -> None:
        """Begin again with the slots filled in the layers' orders; what was counted stays."""
        image, now = self._first.copy(), self._read()
        for first in self._firsts[:-1]:
            counted = [first + word for word in COUNTERS]
            image[counted] = now[counted]
        self._device.write(self._memory.address, image)

    def choices(self, number: int, shape: tuple[int, ...]) -> View:
        """int64: what the GPU (0) or the CPU (1) computes of the choices of the layer at work."""
        first = self.table_firsts[-1] + number * words.MOST_ENTRIES
        return View(self._memory.address + 8 * first, "int64", shape)

    def forget_ahead(self) -> None:
        """Nothing was brought ahead for any step."""
        for first in self._firsts[:-1]:
            self._set(first + words.AHEAD_CLOCK, (-1,))

    def home(self, layer: int, expert: int) -> int:
        """The address of the word that says where an expert is in host memory."""
        word: int = self._firsts[layer] + self._layers[layer].home + expert
        return self._memory.address + 8 * word

    def residents(self) -> list[NDArray[np.int64]]:
        """Of each layer the slots of its experts ``[E]``, -1 for none, once all calls before are finished."""
        image = self._read()
        return [
            image[first + part.slot : first + part.slot + experts]
            for first, part, experts in zip(self._firsts, self._layers, self._experts, strict=False)
        ]

    def counters(self) -> NDArray[np.int64]:
        """``[layers, 5]``: hits, misses, those of the CPU, evictions, bytes taken from what was brought ahead.

        Once all calls before are finished.
        """
        image = self._read()
        rows = [[image[first + word] for word in COUNTERS] for first in self._firsts[:-1]]
        return np.array(rows, np.int64).reshape(len(rows), len(COUNTERS))

    def _set(self, first: int, values: Sequence[int]) -> None:
        """Write the words from ``first`` on; they stay at `restart`."""
        own = self._first[first : first + len(values)]
        own[:] = values
        self._device.write(self._memory.address + 8 * first, own)

    def _read(self) -> NDArray[np.int64]:
        return self._device.read(self._view(0, self._firsts[-1]))

    def _view(self, first: int, size: int) -> View:
        return View(self._memory.address + 8 * first, "int64", (size,))


def fill_state(state: NDArray[np.int64], layer: LayerSlots, policy: Policy, places: Places) -> None:
    """Write the words of one layer, its slots filled with the first of its order."""
    part = words.state_words(layer.experts, layer.experts)
    head = {
        words.EXPERTS: layer.experts,
        words.SLOTS: layer.slots,
        words.STRIDE: layer.stride_bytes,
        words.POLICY: words.POLICY_CODES[policy.name],
        words.HALF_LIFE: half_life_shift(policy),
        words.ADMITS_BETTER: policy.admission == "better",
        words.SLOT_ADDRESS: places.slots,
        words.STAGE_ADDRESS: places.stage,
        words.STAGE_PLACES: places.stage_places,
        words.SECOND: layer.second_bytes,
    }
    for word, value in head.items():
        state[word] = value
    state[words.AHEAD_CLOCK] = state[words.WORTH] = -1
    state[words.SHARE : words.SHARE + len(layer.cpu_share)] = layer.cpu_share
    seeds = list(layer.order[: layer.slots])
    slots = np.full(layer.experts, -1, np.int64)
    slots[seeds] = np.arange(len(seeds))
    table = np.where(slots >= 0, places.slots + slots * layer.stride_bytes, places.homes)
    begin = initial_state(policy, layer.use_shares)
    first = {
        "home": places.homes,
        "slot": slots,
        "uses": begin.uses,
        "last": begin.last,
        "prior": begin.prior,
        "fetch": np.full(layer.experts, -1),
    }
    state[words.TABLE : words.TABLE + layer.experts] = table
    for name, values in first.items():
        place = getattr(part, name)
        state[place : place + layer.experts] = values
    owners = np.full(layer.experts, -1, np.int64)
    owners[: len(seeds)] = seeds
    state[part.owner : part.owner + layer.experts] = owners
