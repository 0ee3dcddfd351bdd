from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from moec.runtime.serving.answers.layouts import finite, text_bytes, token_text
from moec.runtime.tokenizer import Tokenizer
from tests.support import byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


def test_a_tokens_text_has_its_leading_space(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"\u2581hello": 0, "ing": 1, "<s>": 2}, "<s>"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode([0]) == "hello"
    assert [token_text(tokenizer, token) for token in range(3)] == [" hello", "ing", "<s>"]


def test_parts_of_characters_have_no_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_tokenizer.save(tmp_path))
    for token in tokenizer.encode("\u00fc"):
        assert token_text(tokenizer, token) == "\ufffd"
        assert text_bytes(token_text(tokenizer, token)) is None
    (space,) = tokenizer.encode(" ")
    assert text_bytes(token_text(tokenizer, space)) == [32]


@pytest.mark.parametrize(("value", "said"), [(-1.5, -1.5), (-math.inf, -9999.0), (math.nan, -9999.0)])
def test_json_can_say_every_logprob(value: float, said: float) -> None:
    assert finite(value) == said
