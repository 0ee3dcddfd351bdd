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
    if not device.startswith("cuda:") or not number.isdigit():
        raise DeviceError(f"There is no device {device!r}.", "GPUs are called cuda:0, cuda:1, …", "")
    return int(number)


def parse_ordinals(device: str | Sequence[str]) -> tuple[int, ...]:
    """``cuda:0,cuda:1``, or a list of such names, as ``(0, 1)``; ``cpu`` as ``()``.

    Raises:
        DeviceError: a name is no device, or one is there twice.
    """
    named = device.split(",") if isinstance(device, str) else list(device)
    names = [name.strip() for name in named]
    if names == ["cpu"]:
        return ()
    for name in names or [""]:
        if not name.startswith("cuda"):
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


def budgets_of(memory: Budget | Sequence[Budget], gpus: int) -> tuple[Budget, ...]:
    """``device_memory`` for each of so many GPUs: one for all of them, or a list, or a text such as ``8GiB,6GiB``.

    Raises:
        RequestError: there are more or fewer.
    """
    if isinstance(memory, str):
        given: list[Budget] = [each.strip() for each in memory.split(",")]
    else:
        given = list(memory) if isinstance(memory, Sequence) else [memory]
    if len(given) == 1:
        return tuple(given * gpus)
    if len(given) != gpus:
        raise RequestError(
            f"device_memory has {len(given)} amounts for {'one GPU' if gpus == 1 else f'{gpus} GPUs'}.",
            "It is one amount for each GPU, or one for each of them in their order.",
            "Give as many amounts as devices, or one.",
        )
    return tuple(given)
