"""The prompts that routing is profiled with: the shipped set, a user's JSON lines, or random tokens."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moec.artifacts.random_tokens import random_tokens
from moec.errors import CheckpointError

if TYPE_CHECKING:
    from moec.artifacts.model import ModelRecord

DEFAULT_PROMPTS = Path(__file__).with_name("calibration.jsonl")
RANDOM_PROMPTS = 16
RANDOM_TOKENS = 32


@dataclass(frozen=True)
class Prompt:
    """One calibration prompt: text for the bundle's tokenizer, or token ids."""

    text: str | None
    token_ids: tuple[int, ...] | None


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read a JSON-lines file: each line ``{"prompt": "text"}`` or ``{"token_ids": [1, 2, 3]}``.

    Raises:
        CheckpointError: the file is missing or a line is neither of the two; the message has its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a string of JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"Cannot read the calibration prompts {path}.", f"{error}.", "Give a readable JSON-lines file."
        ) from error
    prompts = tuple(_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
    if not prompts:
        raise CheckpointError(
            f"{path} has no calibration prompt.", "The file is empty.", 'Write {"prompt": "..."} lines.'
        )
    return prompts


def random_prompts(model: ModelRecord, seed: int = 0) -> tuple[Prompt, ...]:
    """Prompts of uniformly random tokens, for checkpoints without a tokenizer."""
    draw = random.Random(seed)  # noqa: S311 - reproducible test data, not a secret
    return tuple(
        Prompt(None, tuple(random_tokens(model, RANDOM_TOKENS, draw))) for _ in range(RANDOM_PROMPTS)
    )


def _parse(path: Path, number: int, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise _bad(path, number, str(error)) from error
    if isinstance(entry, dict) and set(entry) == {"prompt"} and isinstance(entry["prompt"], str):
        return Prompt(entry["prompt"], None)
    if isinstance(entry, dict) and set(entry) == {"token_ids"} and _are_ids(entry["token_ids"]):
        return Prompt(None, tuple(entry["token_ids"]))
    raise _bad(path, number, f"found {line[:80]}")


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)


def _bad(path: Path, number: int, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}, line {number} is no calibration prompt.",
        why,
        'Each line is {"prompt": "text"} or {"token_ids": [1, 2, 3]}.',
    )
