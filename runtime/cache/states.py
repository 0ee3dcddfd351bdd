"""The memory behind the states of sequences, of the layers that have states instead of a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moec.artifacts.states import state_bytes, state_shape
from moec.runtime.device import View
from moec.runtime.engine.pages import table_rows

if TYPE_CHECKING:
    from moec.artifacts.states import StateSpec
    from moec.runtime.device import Device


class StateStorage:
    """One piece of the device's memory with a state for each row of the page table, in every layer that has one.

    Nothing is cleared: a token at position 0 begins anew, whatever the row's last sequence left.

    Args:
        device: whose kernels use it.
        layers: the state of each such layer, in order.
        max_batch: sequences at once; there is one more row, for logits that are asked of by themselves.

    Raises:
        BudgetError: the device has too little memory.
    """

    def __init__(self, device: Device, layers: tuple[StateSpec, ...], max_batch: int) -> None:
        rows = table_rows(max_batch, sources=False)
        self._memory = device.allocate(rows * sum(map(state_bytes, layers))) if layers else None
        address = 0 if self._memory is None else self._memory.address
        self._layers: list[Any] = []
        for spec in layers:
            self._layers.append(device.tensor(View(address, "float32", (rows, *state_shape(spec)))))
            address += rows * state_bytes(spec)

    def layer(self, number: int) -> Any:
        """The states ``[rows, ...]`` of a layer, float32."""
        return self._layers[number]
