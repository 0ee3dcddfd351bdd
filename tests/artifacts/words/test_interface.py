from __future__ import annotations

import re
from pathlib import Path

import pytest

from moec.artifacts import words
from moec.artifacts.words import slots
from moec.artifacts.words.interface import ROOMS, constants, interface


def test_a_word_that_moves_is_another_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    before = interface()
    assert re.fullmatch("[0-9a-f]{16}", before)
    assert interface() == before
    monkeypatch.setattr(slots, "WORTH", slots.WORTH + 1)
    moved = interface()
    assert moved != before
    monkeypatch.setattr(slots, "PARTS", slots.PARTS[::-1])
    assert interface() not in (before, moved), "and parts in another order"


def test_every_file_of_words_is_in_it() -> None:
    files = {path.stem for path in Path(words.__file__).parent.glob("*.py")} - {"__init__", "interface"}
    assert files == {room.__name__.rpartition(".")[2] for room in ROOMS}
    assert {"slots.SOURCE", "mailbox.DONE", "orders.COPIED", "sampling.SEED", "ahead.BOUND"} <= set(
        constants()
    )
