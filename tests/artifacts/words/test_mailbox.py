from __future__ import annotations

import pytest

from moec.artifacts.words import mailbox
from moec.artifacts.words.mailbox import ENTRIES, mailbox_layout

BYTES = {"int64": 8, "float32": 4}


@pytest.mark.parametrize(("hidden", "top_k"), [(1, 1), (2048, 6), (37, 3), (7168, 256)])
def test_places_are_apart_aligned_and_large_enough(hidden: int, top_k: int) -> None:
    layout = mailbox_layout(hidden, top_k)
    end = 0
    for name in ("words", "index", "weight", "x", "out"):
        place = getattr(layout, name)
        assert place.offset_bytes >= end
        assert place.offset_bytes % 256 == 0
        end = place.offset_bytes + place.count * BYTES[place.dtype]
    assert end <= layout.size_bytes
    tokens = ENTRIES // top_k
    assert layout.x.count == layout.out.count == tokens * hidden
    assert layout.index.count == layout.weight.count >= tokens * top_k


def test_words_of_different_writers_have_lines_of_their_own() -> None:
    writers = {
        "gpu, number": [mailbox.POSTED],
        "cpu": [mailbox.DONE],
        "host": [mailbox.ABORT, mailbox.LIMIT],
        "gpu, failure": [mailbox.FAILED],
        "gpu, request": [mailbox.LAYER, mailbox.COUNT],
    }
    lines = [{word // 16 for word in words} for words in writers.values()]
    assert all(len(each) == 1 for each in lines)
    assert len(set.union(*lines)) == len(writers)
    assert max(max(words) for words in writers.values()) < mailbox.WORDS


def test_counters_of_the_threads_have_lines_of_their_own() -> None:
    counters = [
        mailbox.GATE_TAKEN,
        mailbox.GATE_FINISHED,
        mailbox.DOWN_TAKEN,
        mailbox.DOWN_FINISHED,
        mailbox.STOP,
    ]
    assert len({word // 8 for word in counters}) == len(counters)
    assert max(counters) < mailbox.CONTROL_WORDS
