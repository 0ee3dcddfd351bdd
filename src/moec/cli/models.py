"""``moec models``: the model types that moec knows, and their state."""

from __future__ import annotations

import click

from moec.cli.options import json_option
from moec.cli.output import print_json, print_table


@click.command("models", short_help="List the model types, and which of them compile.")
@click.option("--state", type=click.Choice(["supported", "untested", "unsupported"]), help="Only these.")
@json_option
def command(state: str | None, as_json: bool) -> None:
    """List the Mixture-of-Experts model types and whether moec compiles them.

    \b
    Example:
      moec models --state supported
    """
    from moec.compiler.supported import MODELS

    rows = [
        (name, entry.state, entry.reason or entry.note)
        for name, entry in MODELS.items()
        if state in (None, entry.state)
    ]
    if as_json:
        print_json([{"model_type": name, "state": kind, "note": note} for name, kind, note in rows])
    else:
        print_table(("model type", "state", "note"), rows)
