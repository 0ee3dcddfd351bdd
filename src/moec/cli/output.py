"""How commands print: tables and JSON to stdout, a stage list and a progress bar to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from moec.artifacts.sizes import human_bytes
from moec.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from moec.artifacts.schedule import Policy

BAR_WIDTH = 30
REDRAW_SECONDS = 0.2


def print_json(data: Any) -> None:
    """Print one JSON document, keys in the order given."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_json_line(data: Any) -> None:
    """Print one JSON document on a line of its own, for commands that print several."""
    click.echo(json.dumps(data, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a header, columns as wide as their widest cell; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in cells) and bool(cells) for i in range(len(header))]
    for row in [list(header), *cells]:
        parts = [
            c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)
        ]
        click.echo("  ".join(parts).rstrip())


def _is_number(text: str) -> bool:
    return bool(text) and (text[0].isdigit() or text[0] in "-+.") and not text[-1].isspace()


def policy_name(policy: Policy) -> str:
    """A policy in a few words, such as ``lrfu 16, if better``."""
    life = f" {policy.half_life_tokens}" if policy.half_life_tokens else ""
    return f"{policy.name}{life}" + (", if better" if policy.admission == "better" else "")


def write_page(path: Path, page: str) -> None:
    """Write a page of HTML.

    Raises:
        OutputError: it cannot be written there.
    """
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written.", f"{error.strerror}.", "Name a file in a folder that is there."
        ) from error


class StageLog:
    """Prints each stage's name, and its seconds when it ends, to stderr."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        self._write(f"{name} ... " if sys.stderr.isatty() else "")
        start = time.perf_counter()
        try:
            yield
        except BaseException as error:
            end = "failed" if isinstance(error, Exception) else "stopped"
            self._write(f"{end}\n" if sys.stderr.isatty() else f"{name}: {end}\n")
            raise
        seconds = time.perf_counter() - start
        self._write(f"{seconds:.1f} s\n" if sys.stderr.isatty() else f"{name}: {seconds:.1f} s\n")

    def note(self, text: str) -> None:
        """Say one thing worth knowing."""
        self._write(f"  {text}\n")

    def _write(self, text: str) -> None:
        if not self._quiet:
            sys.stderr.write(text)
            sys.stderr.flush()


class ProgressBar:
    """A byte-counting bar on stderr; silent where stderr is not a terminal."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._total = 0
        self._done = 0
        self._drawn = 0.0
        self._active = sys.stderr.isatty()

    def start(self, total_bytes: int) -> None:
        """Set the total; may be called again when more is found out."""
        self._total = total_bytes
        self._draw()

    def advance(self, count: int) -> None:
        """Add ``count`` finished bytes."""
        self._done += count
        if time.monotonic() - self._drawn > REDRAW_SECONDS:
            self._draw()

    def close(self) -> None:
        """Draw the last state and end the line."""
        self._draw()
        if self._active:
            sys.stderr.write("\n")

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        if not self._active:
            return
        share = self._done / self._total if self._total else 1.0
        bar = "#" * round(BAR_WIDTH * min(share, 1.0))
        sys.stderr.write(
            f"\r{self._label} [{bar:<{BAR_WIDTH}}] {human_bytes(self._done)} of {human_bytes(self._total)}"
        )
        sys.stderr.flush()
