"""Random weights of a real model's shape, straight to disk or straight into a bundle, with all cores.

python -m benchmarks.make_checkpoint deepseek-v2-lite /tmp/deepseek-v2-lite
python -m benchmarks.make_checkpoint --bundle deepseek-v2-lite.modules -o deepseek-v2-lite.moec

The second takes what ``moec compile --modules-only`` made and needs neither torch nor a checkpoint.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from benchmarks.random_weights.values import DEVIATION
from moec.errors import MoecError

CONFIGS = {path.stem: path for path in sorted(Path(__file__).with_name("configs").glob("*.json"))}
"""``config.json`` by name: as published, but for the names that say what of it is smaller."""


@click.command()
@click.argument("name", type=click.Choice(list(CONFIGS)), required=False)
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--bundle", "modules", type=click.Path(path_type=Path), metavar="MODULES")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle to make.")
@click.option("--deviation", default=DEVIATION, show_default=True, help="Of a bundle's weights.")
@click.option("--threads", type=click.IntRange(min=1), help="[default: all cores]")
@click.option("--alike", is_flag=True, help="Of a bundle: all layers' experts are one file.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there already.")
def main(
    name: str | None,
    folder: Path | None,
    modules: Path | None,
    output: Path | None,
    deviation: float,
    threads: int | None,
    alike: bool,
    force: bool,
) -> None:
    """Write the checkpoint NAME into FOLDER, or with --bundle a bundle of MODULES."""
    start = time.perf_counter()
    if modules is not None and output is not None and name is None:
        from benchmarks.random_weights.bundle import write_bundle

        try:
            size = write_bundle(
                modules, output, deviation=deviation, workers=threads, alike=alike, force=force
            )
        except MoecError as error:
            raise click.ClickException(str(error)) from error
        target = output
    elif name is not None and folder is not None and modules is None:
        from benchmarks.random_weights.checkpoint import write_checkpoint

        size, target = write_checkpoint(CONFIGS[name], folder, workers=threads), folder
    else:
        raise click.UsageError("Give NAME and FOLDER, or --bundle MODULES and -o OUTPUT.")
    seconds = time.perf_counter() - start
    print(f"{target}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
