"""What the host tells the kernels of a step, as they see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.layout.chain import CHAIN_INPUTS
from moec.runtime.device import View

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.artifacts.ids import ValueId
    from moec.runtime.device import Device
    from moec.runtime.engine.batch import StepBatch


class BatchMirrors:
    """The arrays of a `StepBatch` as the device's kernels see them."""

    def __init__(self, device: Device, batch: StepBatch) -> None:
        self.batch = batch
        self._positions = device.mirror(batch.positions)
        self._each = {name: device.mirror(array) for name, array in batch.each.items()}
        self._tokens = device.mirror(batch.tokens)
        self._page_table = device.mirror(batch.page_table)
        self._page_table.update()

    @property
    def tokens(self) -> int:
        """Where the step's token ids lie; a device that chooses tokens puts them there for the next step."""
        return self._tokens.address

    def update(self, rows: Sequence[int], *, ahead: bool = False) -> None:
        """Show the device the step that the batch holds now, and ``rows`` of its page table.

        ``ahead``: the device has the tokens already.
        """
        for mirror in (self._positions, *self._each.values(), *(() if ahead else (self._tokens,))):
            mirror.update(self.batch.count)
        for row in rows:
            self._page_table.update(1, row)

    def chain_input(self, name: ValueId) -> int:
        """The address of ``tokens`` or ``positions``."""
        return (self._tokens, self._positions)[CHAIN_INPUTS.index(name)].address

    def page_table(self) -> View:
        """Where pages of each row are told."""
        return View(self._page_table.address, "int32", self.batch.page_table.shape)

    def each(self, name: str, count: int) -> View:
        """What each of ``count`` tokens is told; one of the names in `StepBatch.each`."""
        return View(self._each[name].address, "int32", (count,))
