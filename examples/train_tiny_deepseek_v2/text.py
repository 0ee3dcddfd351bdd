"""The text: verses, gathered to chapters of prose."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pathlib import Path

VERSE = re.compile(r"^(\d?[A-Za-z]+)(\d+):(\d+) (.*)$")


@dataclass(frozen=True)
class Chapter:
    """One chapter as prose: a few verses to the line, without their numbers."""

    name: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole chapter."""
        return "\n".join(self.lines)

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training: one chapter in twenty, by the hash of its name."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big") % 20 == 0


def read_text(path: Path | None) -> str:
    """The whole text, a verse a line, from a file or from the package's program."""
    if path is not None:
        return path.read_text(encoding="ascii")
    command = ["bible", "-f", "gen1:1-rev22:21"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def to_lines(name: str, verses: list[str]) -> tuple[str, ...]:
    """Joins two to four verses to a line, as the chapter's name has it."""
    rng = random.Random(name)
    lines: list[str] = []
    at = 0
    while at < len(verses):
        count = rng.randint(2, 4)
        lines.append(" ".join(verses[at : at + count]))
        at += count
    return tuple(lines)


def to_chapters(text: str) -> list[Chapter]:
    """Takes the verse marks off and gathers the verses of each chapter."""
    verses: dict[str, list[str]] = {}
    for line in text.splitlines():
        match = VERSE.match(line)
        if match is None:
            raise click.ClickException(f"not a verse: {line!r}")
        book, chapter, _, words = match.groups()
        verses.setdefault(f"{book} {chapter}", []).append(words.strip())
    return [Chapter(name, to_lines(name, found)) for name, found in verses.items()]
