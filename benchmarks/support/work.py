"""What an end-to-end run does, and the least time that it can take."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from moec.artifacts.layout.footprint import footprint
from moec.cli.bench import run_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.artifacts.layout.footprint import LayerFootprint
    from moec.artifacts.model import ModelRecord
    from moec.runtime import Model


@dataclass(frozen=True)
class Work:
    """``batch`` sequences at once, each with a prompt and a continuation."""

    batch: int
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt_tokens}+{self.new_tokens}"


def run_work(
    model: Model, work: Work, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, list[float]]:
    """Seconds of the prefill, and of each decoding step."""
    return run_batch(model, work.prompt_tokens, work.new_tokens, work.batch, clock)


class WorkType(click.ParamType):  # type: ignore[type-arg]
    """``8x512+64``: 8 sequences of 512 tokens each, continued by 64."""

    name = "work"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Work:
        """Parse it."""
        if isinstance(value, Work):
            return value
        match = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", value)
        if match is None:
            self.fail(f"{value!r} is not like 8x512+64", param, ctx)
        return Work(*(int(group) for group in match.groups()))


def distinct_experts(layer: LayerFootprint, batch: int) -> float:
    """Experts of a layer that ``batch`` tokens choose together, expected of uniform routing."""
    return layer.experts * (1 - (1 - layer.top_k / layer.experts) ** batch)


def decode_bytes(model: ModelRecord, batch: int) -> float:
    """Weights that a decode step of ``batch`` sequences reads: dense ones once, each chosen expert once."""
    facts = footprint(model)
    experts = sum(distinct_experts(layer, batch) * layer.expert_bytes for layer in facts.layers)
    return facts.dense_bytes_per_token + experts
