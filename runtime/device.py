"""What the executor asks of a device: memory, tensors over it, copies, and running lists of calls.

The executor plans one arena, takes its memory from the device, and makes for each token count T the list of calls
of a step. How a list runs is the device's: one call after the other on the CPU, captured graphs on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from moec.artifacts.model import DTYPE_BYTES
from moec.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from moec.runtime.engine.sequence import Sequence as RunningSequence
    from moec.runtime.stats import Stats

ALIGNMENT_BYTES = 256
"""Every allocation and every tensor of the arena begins at a multiple of so many bytes."""


def padded_bytes(size: int) -> int:
    """Up to the next multiple of `ALIGNMENT_BYTES`."""
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def closed_error() -> DeviceError:
    """For what is asked of a device that gave everything back."""
    return DeviceError("The device is closed.", "The model that used it was closed.", "Load it again.")


class View(NamedTuple):
    """A contiguous tensor in memory of the device, by where it lies."""

    address: int
    dtype: str
    shape: tuple[int, ...]


def view_bytes(view: View) -> int:
    """What a tensor occupies."""
    return DTYPE_BYTES[view.dtype] * math.prod(view.shape)


@dataclass(frozen=True, slots=True)
class PackedCall:
    """A compiled function on tensors of the device; it reads nothing of the host, so that it can be captured."""

    stage: str
    """One of `moec.runtime.stats.STAGES`."""
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class CapturedCall(PackedCall):
    """One that runs in captured steps alone: while the host makes single launches, it may not be able to answer."""

    before: PackedCall
    """Runs in its place elsewhere."""


@dataclass(frozen=True, slots=True)
class HostCall:
    """Work of the host between packed calls (bringing experts in); it may launch functions itself."""

    stage: str
    run: Callable[[], None]


Call: TypeAlias = PackedCall | HostCall


class Memory(Protocol):
    """Contiguous memory that kernels of the device can read and write; it is given back with the last reference."""

    @property
    def address(self) -> int:
        """As the device's kernels see it; a multiple of `ALIGNMENT_BYTES` where the device allocated it."""
        ...

    @property
    def size_bytes(self) -> int:
        """Bytes from ``address``."""
        ...


class Mirror(Protocol):
    """A host array as the device's kernels see it: the array itself on the CPU, a copy on a GPU."""

    @property
    def address(self) -> int:
        """Where kernels find the array's first element; it never changes."""
        ...

    def update(self, items: int | None = None, first: int = 0) -> None:
        """Show the device what the host has written: ``items`` of the first axis from ``first`` on, or all of them.

        In order with the calls run before and after; the host may write to the array again at once.
        """
        ...


class Functions(Protocol):
    """The functions of one target's module."""

    def get(self, name: str) -> Callable[..., Any]:
        """The packed function called ``name``.

        Raises:
            BundleError: the module has none.
        """
        ...


class Move(NamedTuple):
    """Bytes of one device that go to another."""

    source: int
    """Their address there."""
    target: int
    """Where they go."""
    size_bytes: int


class Link(Protocol):
    """The way from the memory of one device to that of another."""

    def carry(self, moves: Sequence[Move]) -> None:
        """Copy after the calls so far of the source and before the next ones of the target; the host does not wait."""
        ...

    def settle(self) -> None:
        """Let the next calls of the source wait until what is carried has been read."""
        ...


class TokenSampler(Protocol):
    """Chooses tokens on the device, so that logits stay there."""

    def can_choose(self, sequences: list[RunningSequence], *, ahead: int) -> bool:
        """Whether it can do what these sequences want; the host does it otherwise.

        Args:
            sequences: one for each row.
            ahead: tokens of each that were chosen and that the host has not read.
        """
        ...

    def stage(self, sequences: list[RunningSequence], *, ahead: int) -> None:
        """Tell the device how the next step's rows choose; before its calls run. See `can_choose`."""
        ...

    def call(self, logits: View, tokens: int) -> PackedCall:
        """The call that chooses a token from each row of ``logits`` and puts it at the address ``tokens``, int64."""
        ...

    def read(self, sequences: list[RunningSequence], tokens: int) -> Callable[[], list[int]]:
        """Begin to read what the step that was put into the queue last chooses.

        Returns:
            What waits for the tokens; the sequences' samplers know them then. It must be called before the step after
            the next one is read.
        """
        ...


class Device(Protocol):
    """A processor with its memory. One thread uses it at a time, and what it is asked is done in that order."""

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``, as in `moec.artifacts.files.manifest.TargetRecord`."""
        ...

    def load(self, folder: Path, files: Sequence[str]) -> Functions:
        """Load a target's module; ``files`` are the target's in the manifest, relative to the bundle ``folder``."""
        ...

    def allocate(self, size_bytes: int) -> Memory:
        """Memory whose contents are undefined.

        Raises:
            BudgetError: there is not so much.
        """
        ...

    def hold(self, data: NDArray[Any]) -> Memory:
        """Memory with the bytes of ``data``, for kernels to read: its own on the CPU (kept alive), a copy on a GPU."""
        ...

    def mirror(self, array: NDArray[Any]) -> Mirror:
        """Let kernels see a C-contiguous host array that changes from step to step."""
        ...

    def tensor(self, view: View) -> Any:
        """A ``tvm_ffi.Tensor`` over memory of the device; no copy, no ownership."""
        ...

    def write(self, address: int, source: NDArray[Any]) -> None:
        """Copy a C-contiguous host array into the device's memory."""
        ...

    def read(self, view: View) -> NDArray[Any]:
        """What is in ``view``, once all calls before are finished: the memory itself on the CPU, else a copy."""
        ...

    def gather(self, source: int, target: int, rows: Sequence[int], row_bytes: int) -> None:
        """Copy ``rows`` (each of ``row_bytes``) from address ``source`` to lie one after the other at ``target``."""
        ...

    def prepare(self, calls: Sequence[Call], stats: Stats, *, often: bool = False) -> Callable[[], None]:
        """Make a list of calls ready to run again and again, in order.

        Args:
            calls: one part of a step for one T: the same functions on the same tensors each time.
            stats: each run adds its wall time to the milliseconds of the calls' stages.
            often: whether it will run so often that some work now is worth it, as decoding steps do.

        Returns:
            What runs them. It may return before a GPU has finished; `read` waits.
        """
        ...

    def mark(self) -> Callable[[], None]:
        """What to call when everything that was launched so far is known to be finished.

        What it returns raises `DeviceError` where a part of it was not done.
        """
        ...

    def close(self) -> None:
        """Give everything back. The device, its memory and its tensors cannot be used any more."""
        ...

    def synchronize(self) -> None:
        """Wait until all calls have finished.

        Raises:
            DeviceError: one of them failed.
        """
        ...
