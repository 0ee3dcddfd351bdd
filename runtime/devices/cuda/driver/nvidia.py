"""The driver of this machine, through ``cuda.bindings.driver``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from moec.errors import DeviceError, MissingDependencyError
from moec.runtime.devices.cuda.driver.functions import OutOfDeviceMemoryError
from moec.runtime.process import OwnProcess

if TYPE_CHECKING:
    from moec.runtime.devices.cuda.driver.functions import Handle

NO_DEVICE = 100
OUT_OF_MEMORY = 2
NOT_READY = 600
REACHED_ALREADY = 704
CAPTURE_THIS_THREAD = 1
"""``CU_STREAM_CAPTURE_MODE_THREAD_LOCAL``: other threads may do what a capture forbids."""
STREAM_NON_BLOCKING = 1
FIRST_PRIORITY = -99
"""Of a stream: the driver takes the first that there is."""
EVENT_TIMED, EVENT_UNTIMED = 0, 2
REGISTER_MAPPED = 2
"""``CU_MEMHOSTREGISTER_DEVICEMAP``."""
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
"""Device attributes."""
ENTRY_VERSION = 12000
"""Of CUDA, whose form of a function is looked up."""

_process: OwnProcess | None = None
"""The one that the driver was started in."""


class NvidiaDriver:
    """See `moec.runtime.devices.cuda.driver.functions.Driver`.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        DeviceError: there is no driver, or it does not start, as in a fork of a process that has started it.
    """

    def __init__(self) -> None:
        global _process  # noqa: PLW0603
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise MissingDependencyError(
                "The package cuda-bindings is not installed.",
                "The runtime reaches the NVIDIA driver through it.",
                'Install it: pip install "moec[cuda]"',
            ) from error
        self._api: Any = driver
        if _process is not None and not _process.here:
            raise DeviceError(
                "This process cannot use GPUs.",
                "It was forked from one that does, and NVIDIA's driver does not go along.",
                "Start processes by multiprocessing's spawn, or fork before anything is loaded onto a GPU.",
            )
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:
            raise DeviceError(
                "There is no NVIDIA driver.", str(error), "Install NVIDIA's driver (580 or newer)."
            ) from error
        _process = OwnProcess()

    def version(self) -> tuple[int, int]:
        """See `Driver`."""
        number = int(self._call("cuDriverGetVersion"))
        return number // 1000, number % 1000 // 10

    def device_count(self) -> int:
        """See `Driver`."""
        return int(self._call("cuDeviceGetCount"))

    def device_name(self, ordinal: int) -> str:
        """See `Driver`."""
        name: bytes = self._call("cuDeviceGetName", 256, self._device(ordinal))
        return name.split(b"\0")[0].decode()

    def capability(self, ordinal: int) -> tuple[int, int]:
        """See `Driver`."""
        return self.attribute(ordinal, CAPABILITY_MAJOR), self.attribute(ordinal, CAPABILITY_MINOR)

    def attribute(self, ordinal: int, number: int) -> int:
        """See `Driver`."""
        kind = self._api.CUdevice_attribute(number)
        return int(self._call("cuDeviceGetAttribute", kind, self._device(ordinal)))

    def retain_context(self, ordinal: int) -> Handle:
        """See `Driver`."""
        return cast("Handle", self._call("cuDevicePrimaryCtxRetain", self._device(ordinal)))

    def release_context(self, ordinal: int) -> None:
        """See `Driver`."""
        self._call("cuDevicePrimaryCtxRelease", self._device(ordinal))

    def use_context(self, context: Handle) -> None:
        """See `Driver`."""
        self._call("cuCtxSetCurrent", context)

    def swap_context(self, context: Handle) -> Handle | None:
        """See `Driver`."""
        before: Any = self._call("cuCtxGetCurrent")
        self.use_context(context)
        wanted: Any = context
        return None if int(before) in {0, int(wanted)} else cast("Handle", before)

    def can_reach(self, ordinal: int, other: int) -> bool:
        """See `Driver`."""
        return bool(self._call("cuDeviceCanAccessPeer", self._device(ordinal), self._device(other)))

    def reach(self, other: Handle) -> None:
        """See `Driver`."""
        (status,) = self._api.cuCtxEnablePeerAccess(other, 0)
        if status and int(status) != REACHED_ALREADY:
            self._fail("cuCtxEnablePeerAccess", status)

    def memory_info(self) -> tuple[int, int]:
        """See `Driver`."""
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, size_bytes: int) -> int:
        """See `Driver`."""
        return int(self._call("cuMemAlloc", size_bytes))

    def free(self, address: int) -> None:
        """See `Driver`."""
        self._call("cuMemFree", address)

    def allocate_pinned(self, size_bytes: int) -> int:
        """See `Driver`."""
        return int(self._call("cuMemHostAlloc", size_bytes, 0))

    def free_pinned(self, address: int) -> None:
        """See `Driver`."""
        self._call("cuMemFreeHost", address)

    def register(self, address: int, size_bytes: int) -> None:
        """See `Driver`."""
        self._call("cuMemHostRegister", address, size_bytes, REGISTER_MAPPED)

    def unregister(self, address: int) -> None:
        """See `Driver`."""
        self._call("cuMemHostUnregister", address)

    def create_stream(self, urgent: bool = False) -> Handle:
        """See `Driver`."""
        if urgent:
            stream = self._call("cuStreamCreateWithPriority", STREAM_NON_BLOCKING, FIRST_PRIORITY)
            return cast("Handle", stream)
        return cast("Handle", self._call("cuStreamCreate", STREAM_NON_BLOCKING))

    def destroy_stream(self, stream: Handle) -> None:
        """See `Driver`."""
        self._call("cuStreamDestroy", stream)

    def synchronize(self, stream: Handle) -> None:
        """See `Driver`."""
        self._call("cuStreamSynchronize", stream)

    def create_event(self, timed: bool = False) -> Handle:
        """See `Driver`."""
        return cast("Handle", self._call("cuEventCreate", EVENT_TIMED if timed else EVENT_UNTIMED))

    def destroy_event(self, event: Handle) -> None:
        """See `Driver`."""
        self._call("cuEventDestroy", event)

    def record(self, event: Handle, stream: Handle) -> None:
        """See `Driver`."""
        self._call("cuEventRecord", event, stream)

    def wait(self, event: Handle) -> None:
        """See `Driver`."""
        self._call("cuEventSynchronize", event)

    def happened(self, event: Handle) -> bool:
        """See `Driver`."""
        (status,) = self._api.cuEventQuery(event)
        if status and int(status) != NOT_READY:
            self._fail("cuEventQuery", status)
        return not status

    def wait_in(self, stream: Handle, event: Handle) -> None:
        """See `Driver`."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def milliseconds(self, start: Handle, end: Handle) -> float:
        """See `Driver`."""
        return float(self._call("cuEventElapsedTime", start, end))

    def copy_in(self, address: int, source: int, size_bytes: int, stream: Handle) -> None:
        """See `Driver`."""
        self._call("cuMemcpyHtoDAsync", address, source, size_bytes, stream)

    def copy_out(self, target: int, address: int, size_bytes: int, stream: Handle) -> None:
        """See `Driver`."""
        self._call("cuMemcpyDtoHAsync", target, address, size_bytes, stream)

    def copy_within(self, target: int, source: int, size_bytes: int, stream: Handle) -> None:
        """See `Driver`."""
        self._call("cuMemcpyDtoDAsync", target, source, size_bytes, stream)

    def copy_across(
        self,
        target: int,
        target_context: Handle,
        source: int,
        source_context: Handle,
        size_bytes: int,
        stream: Handle,
    ) -> None:
        """See `Driver`."""
        self._call("cuMemcpyPeerAsync", target, target_context, source, source_context, size_bytes, stream)

    def fill(self, address: int, value: int, size_bytes: int, stream: Handle) -> None:
        """See `Driver`."""
        self._call("cuMemsetD8Async", address, value, size_bytes, stream)

    def entry(self, name: str) -> int:
        """See `Driver`."""
        status, address, _ = self._api.cuGetProcAddress(name.encode(), ENTRY_VERSION, 0)
        return 0 if status else int(address)

    def number(self, stream: Handle) -> int:
        """See `Driver`."""
        return int(cast("Any", stream))

    def begin_capture(self, stream: Handle) -> None:
        """See `Driver`."""
        mode = self._api.CUstreamCaptureMode(CAPTURE_THIS_THREAD)
        self._call("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Handle) -> Handle:
        """See `Driver`."""
        noted = self._call("cuStreamEndCapture", stream)
        try:
            return cast("Handle", self._call("cuGraphInstantiate", noted, 0))
        finally:
            self._call("cuGraphDestroy", noted)

    def launch(self, graph: Handle, stream: Handle) -> None:
        """See `Driver`."""
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Handle) -> None:
        """See `Driver`."""
        self._call("cuGraphExecDestroy", graph)

    def _device(self, ordinal: int) -> Any:
        return self._call("cuDeviceGet", ordinal)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._api, name)(*arguments)
        if status:
            self._fail(name, status)
        return values[0] if len(values) == 1 else values

    def _fail(self, name: str, status: Any) -> None:
        if int(status) == OUT_OF_MEMORY:
            raise OutOfDeviceMemoryError(name)
        if int(status) == NO_DEVICE:
            raise DeviceError(
                "There is no NVIDIA GPU.",
                "The driver is installed and lists none.",
                "Check nvidia-smi and CUDA_VISIBLE_DEVICES.",
            )
        _, text = self._api.cuGetErrorString(status)
        why = text.decode() if isinstance(text, bytes) else str(text)
        raise DeviceError(
            f"The GPU failed: {name} answered {getattr(status, 'name', status)}.",
            f"{why[:1].upper()}{why[1:]}.",
            "Errors of kernels show late, at the next call. Load the model again in a new process.",
        )
