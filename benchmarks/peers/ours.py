"""moec's side of what is measured beside others: kinds of weights, what a bundle has of them, and one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from benchmarks.support.children import ENGINE, run_child
from moec.artifacts.files.reader import open_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.support.work import Work

KINDS = {"bf16": "bf16", "8bit": "q8_0", "4bit": "q4_0"}
"""llama.cpp's format of each kind; a bundle of moec says its own."""
Pair = tuple[str, str]


class PairType(click.ParamType):  # type: ignore[type-arg]
    """``KIND=VALUE``."""

    name = "pair"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Pair:
        """Split it."""
        kind, equals, rest = str(value).partition("=")
        if not equals or kind not in KINDS:
            self.fail(f"{value!r} is not like bf16=... with one of {', '.join(KINDS)}", param, ctx)
        return kind, rest


def weights_of(bundle: Path) -> str:
    """The formats of its experts."""
    bodies = open_bundle(bundle, verify="sizes").model.bodies
    return ", ".join(sorted({body.format or body.dtype for body in bodies}))


def run_engine(bundle: Path, work: Work, options: list[str]) -> dict[str, Any]:
    """What one process of ``engine_run`` says, its times by the names that the others' have."""
    facts = run_child(ENGINE, bundle, [work], options)
    run = facts["runs"][0]
    return facts | {"first_token_seconds": run["prefill_seconds"], "step_seconds": run["step_seconds"]}
