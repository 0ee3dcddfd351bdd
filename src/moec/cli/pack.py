"""``moec pack``: weights into modules that were compiled elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from moec.cli.compile import (
    calibration_option,
    force_option,
    output_option,
    read_calibration,
    surroundings,
)
from moec.cli.options import json_option
from moec.cli.summary import print_summary


@click.command("pack", short_help="Add the weights to what `compile --modules-only` made.")
@click.argument("model")
@click.argument("modules", type=click.Path(path_type=Path))
@output_option
@calibration_option
@force_option
@json_option
def command(
    model: str, modules: Path, output: Path, calibration: str | None, force: bool, as_json: bool
) -> None:
    """Make a bundle from the weights of MODEL and the MODULES that `moec compile --modules-only` made.

    Compiling needs no weights and packing needs no compiler, so they can run on different machines.

    \b
    Example:
      moec compile examples/tiny-deepseek-v2 -o tiny.modules --modules-only
      moec pack examples/tiny-deepseek-v2 tiny.modules -o tiny.moec
    """
    from moec.compiler.pipeline import pack_model

    manifest = pack_model(model, modules, output, read_calibration(calibration), surroundings(), force=force)
    print_summary(output, manifest, as_json)
