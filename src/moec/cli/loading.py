"""Load a bundle for a command, with a bar of what is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from moec.cli.output import ProgressBar

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Unpack

    from moec.cli.options import LoadOptions
    from moec.runtime import Model


def new_tokens_after(model: Model, ids: list[int], most: int) -> int:
    """``most``, or as many tokens as context and cache hold after a prompt or behind a source, but at least one."""
    from moec.runtime.engine.continuation import room

    source, prompt = (ids, ids[:1]) if model.has_encoder else ([], ids)
    return min(most, room(model.engine, tuple(prompt), tuple(source)))


def load_model(
    bundle: Path,
    *,
    max_batch: int = 8,
    cache_tokens: int | None = None,
    prefix_caching: bool | None = False,
    **options: Unpack[LoadOptions],
) -> Model:
    """``runtime.load``: all that is not known to be right is verified."""
    from moec import runtime
    from moec.artifacts.files.reader import find_bundle

    found = find_bundle(bundle, "once")
    unread = set(found.states) - found.unhashed if options["device"] == "cpu" else ()
    files = found.manifest.files
    bar = ProgressBar("load")
    bar.start(sum(record.size_bytes for name, record in files.items() if name not in unread))
    try:
        model = runtime.load(
            bundle,
            max_batch=max_batch,
            cache_tokens=cache_tokens,
            prefix_caching=prefix_caching,
            progress=bar.advance,
            **options,
        )
    finally:
        bar.close()
    for note in model.notes:
        click.echo(note, err=True)
    return model
