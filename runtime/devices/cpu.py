"""The CPU: kernels read weights where the bundle's files are mapped, and run when they are called."""

from __future__ import annotations

import ctypes
import mmap
from time import perf_counter
from typing import TYPE_CHECKING, Any

from moec.errors import BudgetError
from moec.runtime.device import PackedCall
from moec.runtime.machine.libraries import load_libraries
from moec.runtime.tensors import array_at, tensor_at

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from moec.runtime.device import Call, View
    from moec.runtime.machine.libraries import LibraryFunctions
    from moec.runtime.stats import Stats


class _Mapped:
    """An anonymous mapping; pages become resident as they are first written."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._memory = mmap.mmap(-1, max(mmap.PAGESIZE, size_bytes))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


class _Held:
    """An array's own memory."""

    def __init__(self, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous
        self._array = array
        self.address: int = array.ctypes.data
        self.size_bytes: int = array.nbytes

    def update(self, _items: int | None = None, _first: int = 0) -> None:
        """Kernels see what the host writes."""


class CpuDevice:
    """See `moec.runtime.device.Device`."""

    kind = "cpu"

    def load(self, folder: Path, files: Sequence[str]) -> LibraryFunctions:
        """Load the shared libraries among ``files``."""
        return load_libraries(folder, files)

    def allocate(self, size_bytes: int) -> _Mapped:
        """An anonymous mapping."""
        try:
            return _Mapped(size_bytes)
        except (OSError, OverflowError) as error:
            raise BudgetError(
                f"{size_bytes} bytes of memory were refused.",
                f"{error}.",
                "Lower cache_tokens, max_batch or max_step_tokens, or free memory.",
            ) from error

    def hold(self, data: NDArray[Any]) -> _Held:
        """The array's own memory."""
        return _Held(data)

    def mirror(self, array: NDArray[Any]) -> _Held:
        """The array's own memory."""
        return _Held(array)

    def tensor(self, view: View) -> Any:
        """A tensor over host memory."""
        return tensor_at(*view)

    def write(self, address: int, source: NDArray[Any]) -> None:
        """Copy an array to ``address``."""
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def read(self, view: View) -> NDArray[Any]:
        """The memory itself."""
        return array_at(*view)

    def gather(self, source: int, target: int, rows: Sequence[int], row_bytes: int) -> None:
        """Copy ``rows`` to lie one after the other."""
        for place, row in enumerate(rows):
            ctypes.memmove(target + place * row_bytes, source + row * row_bytes, row_bytes)

    def prepare(self, calls: Sequence[Call], stats: Stats, *, often: bool = False) -> Callable[[], None]:  # noqa: ARG002
        """One call after the other; the clock is read where the stage changes."""
        stages: list[tuple[str, list[tuple[Callable[..., Any], tuple[Any, ...]]]]] = []
        for call in calls:
            if not stages or stages[-1][0] != call.stage:
                stages.append((call.stage, []))
            if isinstance(call, PackedCall):
                stages[-1][1].append((call.function, call.arguments))
            else:
                stages[-1][1].append((call.run, ()))

        def run() -> None:
            milliseconds, before = stats.milliseconds, perf_counter()
            for stage, functions in stages:
                for function, arguments in functions:
                    function(*arguments)
                after = perf_counter()
                milliseconds[stage] += (after - before) * 1e3
                before = after

        return run

    def mark(self) -> Callable[[], None]:
        """Nothing runs beside the caller."""
        return lambda: None

    def close(self) -> None:
        """Memory goes with its last reference."""

    def synchronize(self) -> None:
        """Nothing runs beside the caller."""
