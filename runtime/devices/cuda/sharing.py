"""The CPU's part in a captured step: what a layer's calls are on the GPU, and the team that answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.words import mailbox
from moec.artifacts.words.mailbox import SENT_WORDS, collect_name, mailbox_layout, post_name
from moec.runtime.device import PackedCall, View, padded_bytes
from moec.runtime.devices.cuda.attended import Attendance
from moec.runtime.devices.cuda.driver.memory import PinnedMemory
from moec.runtime.sharing.mailbox import Mailbox
from moec.runtime.sharing.team import Team, shared_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.artifacts.model import ModelRecord
    from moec.artifacts.words.mailbox import MailboxLayout, MailboxPlace
    from moec.runtime.device import Functions
    from moec.runtime.devices.cuda.device import CudaDevice

LINE_WORDS = 8
"""int64 words between layers' ordinals: a tensor begins at a multiple of 64 bytes."""


class CpuShare:
    """Lets the CPU compute some of the experts that the GPU does not have.

    A layer's calls are ``post``, the GPU's own experts, ``collect``, where it has at most `ENTRIES` choices.

    Args:
        device: the GPU; it is told, so that it wakes the team before each step that may want it.
        functions: of the GPU's module.
        serve: the CPU module's ``serve_experts``.
        model: its MoE layers.
        tables: for each, the address of an int64 ``[E]`` table of its experts in host memory. Both stay where they are.
        threads: of the CPU.
        keep: what owns the tables.

    Raises:
        BudgetError: there is no memory for the mailbox.
        DeviceError: a thread did not start.
    """

    def __init__(
        self,
        device: CudaDevice,
        functions: Functions,
        serve: Callable[..., Any],
        model: ModelRecord,
        tables: Sequence[int],
        threads: int,
        keep: object = None,
    ) -> None:
        self._keep = keep
        self._device = device
        shape = _layout(model)
        self._memory = PinnedMemory(device.resources, shape.size_bytes)
        self._box = Mailbox(self._memory.address, shape)
        self._sent = device.allocate(8 * SENT_WORDS)
        sizes = _scratch_sizes(model)
        self._scratch = device.allocate(sum(sizes))
        self.scratch = tuple(self._scratch.address + sum(sizes[:number]) for number in range(len(sizes)))
        """Room on the GPU for one token's values, sums, choices and their weights, before there are steps."""
        numbers = np.zeros((len(model.experts), LINE_WORDS), np.int64)
        numbers[:, 0] = np.arange(len(model.experts))
        self._numbers = device.hold(numbers)
        self._bodies = [layer.body for layer in model.experts]
        self.experts_us: tuple[float, ...] = ()
        """Microseconds of 0, 1, 2 ... experts on the CPU, as measured when the model was loaded."""
        self.team = Team(serve, self._box, shared_layers(model, tables), threads)
        device.resources.at_close(self.team.close)
        self._attendance = Attendance(self.team, functions, self)
        device.attendances.append(self._attendance)

    def close(self) -> None:
        """Let the threads go; no list of calls may have been made with it. Memory goes with the last reference."""
        self.team.close()
        self._device.attendances.remove(self._attendance)
        self._attendance.leave()

    def post(self, layer: int, hidden: View, on_cpu: View, weight: View) -> tuple[PackedCall, ...]:
        """Make a request of a layer, if ``on_cpu`` names any expert.

        Args:
            layer: its ordinal.
            hidden: ``[T, H]`` float32.
            on_cpu: ``[T, K]`` int64: the CPU's choices, -1 where the GPU computes one.
            weight: ``[T, K]`` float32.
        """
        assert on_cpu.shape[0] * on_cpu.shape[1] <= mailbox.ENTRIES
        shape = self._box.layout
        number = View(self._numbers.address + 8 * LINE_WORDS * layer, "int64", (1,))
        places = shape.words, shape.index, shape.weight, shape.x
        views = (hidden, on_cpu, weight, number, self._notes, *map(self._box.view, places))
        return (self._call(post_name(self._bodies[layer]), views),)

    def collect(self, layer: int, out: View) -> tuple[PackedCall, ...]:
        """Wait for the request's sums, if the layer made one, and add them to ``out [T, H]``."""
        places: tuple[MailboxPlace, ...] = (self._box.layout.words, self._box.layout.out)
        views = (out, self._notes, *map(self._box.view, places))
        return (self._call(collect_name(self._bodies[layer]), views),)

    @property
    def _notes(self) -> View:
        return View(self._sent.address, "int64", (SENT_WORDS,))

    def _call(self, name: str, views: Sequence[View]) -> PackedCall:
        function = self._attendance.function(name)
        return PackedCall("experts", function, tuple(map(self._device.tensor, views)))


def device_bytes(model: ModelRecord) -> int:
    """Of the GPU's memory that a share takes."""
    own = padded_bytes(8 * SENT_WORDS) + padded_bytes(8 * LINE_WORDS * len(model.experts))
    return own + sum(_scratch_sizes(model))


def host_bytes(model: ModelRecord) -> int:
    """Of host memory, pinned or not, that a share takes."""
    middle = 4 * mailbox.ENTRIES * max(body.intermediate for body in model.bodies)
    return _layout(model).size_bytes + middle


def _scratch_sizes(model: ModelRecord) -> list[int]:
    choices = max(layer.top_k for layer in model.experts)
    return [padded_bytes(size) for size in (4 * model.hidden_size,) * 2 + (8 * choices,) * 2]


def _layout(model: ModelRecord) -> MailboxLayout:
    return mailbox_layout(model.hidden_size, min(layer.top_k for layer in model.experts))
