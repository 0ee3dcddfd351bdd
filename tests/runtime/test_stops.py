from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from moec.runtime.stops import StopStrings, StopWatch, text_before
from moec.runtime.tokenizer import TextStream
from tests.support.byte_tokenizer import bytes_tokenizer
from tests.support.served import make_model

if TYPE_CHECKING:
    from pathlib import Path

letters = st.text("ab", max_size=4)


@given(st.lists(letters, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    strings = StopStrings(stops)
    given_out = ""
    for number, piece in enumerate(pieces):
        given_out += strings.push(piece)
        so_far = "".join(pieces[: number + 1])
        if not strings.found:
            held = so_far[len(given_out) :]
            assert so_far.startswith(given_out)
            assert not held or any(stop.startswith(held) and stop != held for stop in stops)
            longer = [so_far[len(so_far) - size :] for size in range(len(held) + 1, len(so_far) + 1)]
            assert not any(stop.startswith(tail) for stop in stops for tail in longer)
    given_out += strings.finish()
    text = "".join(pieces)
    # A stop string that ends earlier hides one that begins earlier and is longer, as it would in a stream.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert given_out == text
        assert not strings.found
    else:
        assert strings.found
        assert text.startswith(given_out)
        assert not any(stop in given_out for stop in stops)
        assert any(text[len(given_out) :].startswith(stop) for stop in stops)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    strings = StopStrings(["\n\nHuman:"])
    assert strings.push("Hi.\n") == "Hi."
    assert strings.push("\nHum") == ""
    assert strings.push("ming") == "\n\nHumming"
    assert strings.push("\n\nHuman: no") == ""
    assert strings.found
    assert strings.push("more") == ""
    assert strings.finish() == ""


def test_a_watch_goes_off_with_the_token_that_completes_a_stop_string() -> None:
    watch = StopWatch(TextStream(bytes_tokenizer()), ("界!", "never"))
    tokens = bytes_tokenizer().encode("世界!?").ids
    assert [watch.push(token) for token in tokens] == [False] * 6 + [True, True]


def test_the_text_before_a_stop_string() -> None:
    assert text_before("one. two. three", ("t", ". ")) == "one"
    assert text_before("one. tw", ("two",)) == "one. tw"


def test_each_row_ends_with_its_own_stop_string(tmp_path: Path) -> None:
    model = make_model(tmp_path, "Grüße, 世界! And more.")
    prompts = [model.encode(text) for text in ("x=", "x=Gr", "x=Grüße, 世界")]
    output = model.generate(prompts, max_new_tokens=40, stop_strings=["世", "more"], pad_token_id=256)
    width = max(map(len, prompts))
    texts = [model.decode(row[width:]) for row in output]
    assert texts == ["Grüße, 世", "üße, 世", "! And more"]
    assert not model.engine.busy
