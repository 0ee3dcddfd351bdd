"""The CPU's share of one layer in a step of many tokens: who computes what, rows to the host, sums back.

The GPU's kernels are told -1 where the CPU computes a choice, and ``collect_<body>`` adds its sums, which are there
already.

H hidden size, T tokens, K chosen of E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.sharing import cpu_share_of_many
from moec.errors import DeviceError
from moec.runtime.device import view_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from moec.artifacts.sharing import ManySpeeds
    from moec.runtime.device import View
    from moec.runtime.devices.cuda.device import CudaDevice
    from moec.runtime.devices.cuda.driver.functions import Handle


@dataclass(frozen=True)
class HostRows:
    """A layer's rows in pinned memory, and the CPU's function on them."""

    arrays: Mapping[str, NDArray[Any]]
    """``x`` and ``out`` ``[T, H]``, ``weight`` ``[T, K]``, ``index`` ``[T, K]`` and the GPU's part of it, ``own``."""
    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def address(self, name: str) -> int:
        """Where one of the arrays lies."""
        return int(self.arrays[name].ctypes.data)

    def compute(self) -> None:
        """``out`` of ``x``, by the experts in ``index`` alone."""
        self.function(*self.arguments)


class LayerShare:
    """One layer of a step of T tokens.

    Args:
        device: the GPU.
        there: a mark: the rows have arrived.
        host: where they arrive.
        rows: what of the GPU's tensors the CPU needs.
        own: where the GPU finds the choices that it computes.
        speeds: of the layer's experts.
        lead: experts of the next layer that the link brings before that one's router has spoken.
        add: adds the CPU's sums to the layer's result.
    """

    def __init__(
        self,
        device: CudaDevice,
        there: Handle,
        host: HostRows,
        rows: Mapping[str, View],
        own: View,
        speeds: ManySpeeds,
        lead: int,
        add: Callable[[], None],
    ) -> None:
        self._device, self._there, self._host, self._rows = device, there, host, rows
        self._own, self._speeds, self.lead, self._add = own, speeds, lead, add
        self.own = device.tensor(own)
        """The choices that the GPU computes, int64 ``[T, K]``, -1 for others."""

    def divide(self, tokens: NDArray[np.int64], missing: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of the missing experts that are in host memory are the CPU's; each has so many ``tokens`` ``[E]``."""
        order = missing[np.argsort(tokens[missing], kind="stable")]
        return order[: cpu_share_of_many(self._speeds, tokens[order])]

    def send(self, index: NDArray[np.int64], theirs: NDArray[np.bool_]) -> None:
        """Tell the GPU which choices are its own, and the CPU the others, with their rows; waits for nothing.

        Args:
            index: all choices ``[T, K]``.
            theirs: which experts are the CPU's ``[E]``.
        """
        driver, stream, host = self._device.driver, self._device.stream, self._host
        known = (index >= 0) & (index < len(theirs))
        on_cpu = theirs[np.where(known, index, 0)] & known
        host.arrays["own"][:] = np.where(on_cpu, -1, index)
        host.arrays["index"][:] = np.where(on_cpu, index, -1)
        driver.copy_in(self._own.address, host.address("own"), view_bytes(self._own), stream)
        for name, view in self._rows.items():
            driver.copy_out(host.address(name), view.address, view_bytes(view), stream)
        driver.record(self._there, stream)

    def compute(self) -> None:
        """Compute the CPU's experts, and have the GPU add their sums behind its own.

        Raises:
            DeviceError: the CPU's function failed.
        """
        self._device.driver.wait(self._there)
        try:
            self._host.compute()
        except Exception as error:
            raise DeviceError(
                "The CPU did not compute its experts of a prompt.",
                f"{error}.",
                "Load the model again with cpu_threads=0.",
            ) from error
        self._add()
