"""What is said of a bundle that was just made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from moec.artifacts.sizes import human_bytes
from moec.cli.output import print_json, print_table

if TYPE_CHECKING:
    from pathlib import Path

    from moec.artifacts.files.manifest import Manifest


def print_summary(output: Path, manifest: Manifest, as_json: bool) -> None:
    """Say what was made, and for a bundle what memory it needs."""
    total = sum(record.size_bytes for record in manifest.files.values())
    rows = memory_rows(output) if manifest.contents == "bundle" else []
    if as_json:
        facts = {"path": str(output), "contents": manifest.contents, "bytes": total}
        print_json(facts | {"targets": [target.name for target in manifest.targets], "memory": rows})
        return
    names = ", ".join(target.name for target in manifest.targets)
    click.echo(
        f"{output}: {manifest.contents} of {manifest.model_name}, {human_bytes(total)}, targets {names}"
    )
    if rows:
        click.echo("\nmemory it needs, by the share of routed experts kept in the fastest tier:")
        header = ("machine", "experts kept", "GPU memory", "host memory", "hit rate", "ms/token (floor)")
        print_table(header, [_memory_cells(row) for row in rows])


def memory_rows(output: Path) -> list[dict[str, Any]]:
    """The memory report of a finished bundle, as JSON values."""
    from moec.artifacts.files.codec import to_json
    from moec.artifacts.files.reader import open_bundle
    from moec.planning.machines import common_machines
    from moec.planning.report import memory_report
    from moec.planning.routing.analysis import analyse
    from moec.planning.shares import share_budgets

    bundle = open_bundle(output, verify="sizes")
    kinds = {target.kind for target in bundle.manifest.targets}
    pairs = share_budgets(bundle.model, common_machines(), kinds)
    return [
        to_json(row) for row in memory_report(analyse(bundle.traces(), bundle.model), bundle.model, pairs)
    ]


def _memory_cells(row: dict[str, Any]) -> tuple[str, ...]:
    kept = row["slots"] if row["device_memory_bytes"] else row["host_experts"]
    return (
        row["machine"],
        f"{kept} of {row['experts']}",
        human_bytes(row["device_used_bytes"]) if row["device_memory_bytes"] else "-",
        human_bytes(row["host_used_bytes"]),
        f"{row['hit_rate']:.2f}",
        f"{row['milliseconds_per_token']:.2f}",
    )
