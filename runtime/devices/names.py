"""What devices are called: ``cpu``, ``cuda:0``."""

from __future__ import annotations

from moec.errors import DeviceError


def parse_ordinal(device: str) -> int:
    """``cuda`` and ``cuda:0`` as 0, ``cuda:1`` as 1.

    Raises:
        DeviceError: it is neither.
    """
    number = device.removeprefix("cuda").removeprefix(":")
    if device == "cuda":
        return 0
    if not device.startswith("cuda:") or not number.isdigit():
        raise DeviceError(f"There is no device {device!r}.", "GPUs are called cuda:0, cuda:1, …", "")
    return int(number)
