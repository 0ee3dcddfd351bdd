"""What devices are called: ``cpu``, ``cuda:0``, several GPUs ``cuda:0,cuda:1``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from moec.errors import DeviceError, RequestError

Budget: TypeAlias = int | float | str | None
"""Bytes, a text such as ``8GiB``, a ratio, or nothing said."""


def parse_ordinal(device: str) -> int:
    """``cuda`` and ``cuda:0`` as 0, ``cuda:1`` as 1.

    Raises:
        DeviceError: it is neither.
    """
    number = device.removeprefix("cuda").removeprefix(":")
    if device == "cuda":
        return 0
    if not device.startswith("cuda:") or not number.isdecimal():
        raise DeviceError(f"There is no device {device!r}.", "GPUs are called cuda:0, cuda:1, …", "")
    return int(number)


def parse_ordinals(device: str | Sequence[str]) -> tuple[int, ...]:
    """``cuda:0,cuda:1``, or a list of such names, as ``(0, 1)``; ``cpu`` as ``()``.

    Raises:
        DeviceError: a name is no device, or one is there twice.
    """
    given: Sequence[object] = device.split(",") if isinstance(device, str) else _listed(device)
    names = [name.strip() for name in given if isinstance(name, str)]
    if names == ["cpu"] == [*given]:
        return ()
    for name in given or [""]:
        if not isinstance(name, str) or not name.strip().startswith("cuda"):
            known = "Known devices: cpu, cuda:0, cuda:1, …, and several GPUs such as cuda:0,cuda:1."
            raise DeviceError(f"There is no device {name!r}.", known, 'Use device="cpu".')
    ordinals = tuple(map(parse_ordinal, names))
    for ordinal in ordinals:
        if ordinals.count(ordinal) > 1:
            raise DeviceError(
                f"The GPU cuda:{ordinal} is named twice.",
                "Each GPU of a model has layers of its own.",
                "Name each GPU once.",
            )
    return ordinals


def _listed(device: object) -> Sequence[object]:
    """The names of a list, or the one thing that is none, which is named in the error."""
    return device if isinstance(device, Sequence) else [device]


def budgets_of(memory: Budget | Sequence[Budget], gpus: int) -> tuple[Budget, ...]:
    """``device_memory`` for each of so many GPUs: one for all of them, or a list, or a text such as ``8GiB,6GiB``.

    Raises:
        RequestError: there are more or fewer.
    """
    if isinstance(memory, str):
        amounts: list[Budget] = [each.strip() for each in memory.split(",")]
    else:
        amounts = list(memory) if isinstance(memory, Sequence) else [memory]
    if len(amounts) == 1:
        return tuple(amounts * gpus)
    if len(amounts) != gpus:
        raise RequestError(
            f"device_memory has {len(amounts)} amounts for {'one GPU' if gpus == 1 else f'{gpus} GPUs'}.",
            "It is one amount for each GPU, or one for each of them in their order.",
            "Give as many amounts as devices, or one.",
        )
    return tuple(amounts)
