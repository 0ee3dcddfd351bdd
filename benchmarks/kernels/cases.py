"""A kernel's call with what it must read and compute, its check, its rival, and the row that comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from benchmarks.support.torch_clock import seconds, side_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXACT = 1e-3
"""Most error of what multiplies in float32."""
ROUNDED = 1e-2
"""Most error of what rounds activations to 16 bits."""

Against: TypeAlias = Literal["copy", "torch"]


@dataclass(frozen=True)
class Judgement:
    """How far a kernel is from float64, and whether it does the same twice."""

    error: float
    same_bits: bool


@dataclass(frozen=True)
class Case:
    """One kernel at one size."""

    kernel: str
    size: str
    calls: Sequence[Callable[[], None]]
    """The same work on different inputs, so that what is timed is not in the cache."""
    judge: Callable[[], Judgement]
    bound: float
    """Most error."""
    bytes_moved: int
    """Fewest bytes of device memory that one call must read and write."""
    flops: int
    against: Against
    aim: float | None
    """Least share of the copy bandwidth, or of torch's speed."""
    rival: Callable[[], Any] | None = None
    """The same work by torch."""


def measure(case: Case, copy_bandwidth: float, device: torch.device, repeats: int) -> dict[str, Any]:
    """A row of the table; ``copy_bandwidth`` in GB/s."""
    judgement = case.judge()
    time = seconds(case.calls, device, repeats=repeats)
    row: dict[str, Any] = {
        "kernel": case.kernel,
        "size": case.size,
        "us": time * 1e6,
        "GB/s": case.bytes_moved / time / 1e9,
        "of copy": case.bytes_moved / time / 1e9 / copy_bandwidth,
        "TFLOP/s": case.flops / time / 1e12,
    }
    if case.rival is not None:
        row |= _rival(case.rival, time, device, repeats)
    reached = row["of copy"] if case.against == "copy" else row.get("of torch", 0.0)
    row |= {"aim": case.aim, "error": judgement.error, "same bits": judgement.same_bits}
    return row | {"verdict": verdict(case, judgement, float(reached))}


def _rival(rival: Callable[[], Any], time: float, device: torch.device, repeats: int) -> dict[str, Any]:
    try:
        theirs = seconds([rival], device, repeats=repeats)
    except RuntimeError:  # no kernel of torch's takes this shape
        return {}
    return {"torch us": theirs * 1e6, "of torch": theirs / time}


def verdict(case: Case, judgement: Judgement, reached: float) -> str:
    """``ok``, or what is wrong; an error that is not a number is wrong."""
    if not judgement.error <= case.bound:
        return "wrong"
    if not judgement.same_bits:
        return "not repeatable"
    if case.aim is not None and not reached >= case.aim:
        return "slow"
    return "ok"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """``|found - expected| / |expected|``, in float64; 0 where they are equal, infinite where one is not a number."""
    difference = (found.double() - expected.double()).norm()
    if difference == 0:  # both may be zero, as the sines of position 0 are
        return 0.0
    error = difference / expected.double().norm()
    return float(error) if torch.isfinite(error) else float("inf")


def judge(call: Callable[[], None], out: torch.Tensor, expected: torch.Tensor) -> Judgement:
    """Run twice, each time into memory that holds what is not a number, and compare."""
    found = []
    for _ in range(2):
        out.fill_(float("nan"))
        with side_stream(out.device):
            call()
        found.append(out.clone())
    return Judgement(relative_error(found[0], expected), torch.equal(found[0], found[1]))
