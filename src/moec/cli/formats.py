"""The options of ``moec compile`` that say which weights are stored in which formats, as records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from moec.artifacts.quantization import Quantization
    from moec.compiler.request import FitRequest

UNROUNDED = (None, "none", "keep")
"""What of ``--quantization`` rounds nothing."""


def read_quantization(option: str | None) -> Quantization | None:
    """``--quantization`` as a policy."""
    from moec.compiler.quantization import POLICIES, policy_named, read_policy

    if option is None:
        return None
    if option in POLICIES:
        return policy_named(option)
    if not Path(option).is_file():
        raise click.BadParameter(
            f"{option} is neither a file nor one of {', '.join(POLICIES)}.", param_hint="--quantization"
        )
    return read_policy(Path(option))


def read_method(method: str | None, *, chosen: bool) -> str | None:
    """``--method``; ``UsageError`` where nothing says which weights get codes."""
    from moec.errors import UsageError

    if method is not None and not chosen:
        raise UsageError(
            "--method has nothing to say here.",
            "Without --fit or a format for --quantization what a checkpoint has is kept, and nothing is rounded.",
            "Add --quantization with a format such as int4, or leave --method out.",
        )
    return method


def read_fit(target: str | None, machine: Path | None, quantization: str | None) -> FitRequest | None:
    """``--fit`` and ``--machine`` as a record.

    Raises:
        UsageError: it is neither a size nor a time; a time has no machine, or a size has one; or formats are named too.
    """
    from moec.artifacts.files.records import read_machine
    from moec.compiler.request import FitRequest
    from moec.errors import UsageError

    if target is None:
        if machine is not None:
            raise UsageError(
                "--machine has nothing to say without --fit.",
                "It is the machine that a time per token is predicted for.",
                "Add --fit with a time such as 20ms, or leave --machine out.",
            )
        return None
    if quantization is not None:
        raise UsageError(
            "--fit and --quantization cannot be given together.",
            "Each of them says the formats of all weights.",
            "Leave one of them out.",
        )
    time = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*ms\s*", target)
    if time is None:
        if machine is not None:
            raise UsageError(
                f"--fit {target} is a size, and needs no --machine.",
                "Whether everything fits a size does not depend on a machine's speeds.",
                "Leave --machine out, or ask for a time such as --fit 20ms.",
            )
        return FitRequest(target, limit_bytes=_size(target))
    if machine is None:
        raise UsageError(
            f"--fit {target} is a time, and there is no machine that it is for.",
            "How long a token takes depends on a machine's memory and speeds.",
            "Add --machine FILE: examples/machines/ has some, and `moec plan` measures this one.",
        )
    return FitRequest(target, milliseconds=float(time[1]), machine=read_machine(machine))


def _size(target: str) -> int:
    from moec.errors import RequestError, UsageError
    from moec.runtime.memory.budget import parse_memory

    try:
        return parse_memory(target, 0, "--fit")
    except RequestError:
        raise UsageError(
            f"--fit {target} is neither a size nor a time.",
            "It is what everything has to fit, such as 8GiB, or what a token may take, such as 20ms.",
            "Change --fit.",
        ) from None
