from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import BundleError, RequestError
from moec.runtime.streamers import TextStreamer
from moec.runtime.tokenizer import TextStream, Tokenizer
from tests.support.byte_tokenizer import bytes_tokenizer, save

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_streamed_text_is_the_text_and_no_piece_has_a_broken_character(text: str) -> None:
    backend = bytes_tokenizer()
    stream = TextStream(backend)
    pieces = [stream.push(token) for token in backend.encode(text).ids]
    assert "".join(pieces) + stream.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    backend = bytes_tokenizer()
    stream = TextStream(backend)
    ids = backend.encode("aé").ids[:-1]
    assert [stream.push(token) for token in ids] == ["a", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_special_tokens_are_left_out(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ids = [*tokenizer.encode("hi"), 256]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hi<end>"


def test_the_text_streamer_prints_pieces_as_they_become_certain(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    file = io.StringIO()
    streamer = TextStreamer(tokenizer, file=file)
    streamer.put(np.array([tokenizer.encode("prompt")]))
    seen = []
    for token in tokenizer.encode("né!"):
        streamer.put(np.array([token]))
        seen.append(file.getvalue())
    streamer.end()
    assert seen == ["n", "n", "né", "né!"]
    assert file.getvalue() == "né!\n"


def test_a_text_streamer_takes_one_prompt_after_the_other(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    file = io.StringIO()
    streamer = TextStreamer(tokenizer, file=file, stop_strings=["!"])
    for prompt, answer in (("one", "yes!"), ("two", "no")):
        streamer.put(np.array([tokenizer.encode(prompt)]))
        for token in tokenizer.encode(answer):
            streamer.put(np.array([token]))
        streamer.end()
    assert file.getvalue() == "yes\nno\n"


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("place", ["config", "named", "jinja", "json"])
def test_chat_templates_are_found_wherever_checkpoints_keep_them(folder: Path, place: str) -> None:
    config: dict[str, object] = {"bos_token": {"content": "<s>"}}
    if place == "config":
        config["chat_template"] = TEMPLATE
    elif place == "named":
        config["chat_template"] = [
            {"name": "tool", "template": "no"},
            {"name": "default", "template": TEMPLATE},
        ]
    elif place == "jinja":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    else:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(folder)
    assert tokenizer.has_chat_template
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages) == "<s>[user] hello\n[assistant]"


def test_a_template_can_refuse_and_cannot_escape(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate"):
        Tokenizer(folder).apply_chat_template([])
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(RequestError, match="unsafe"):
        Tokenizer(folder).apply_chat_template([])


@pytest.mark.parametrize(
    "template",
    ["{{ 'a' + messages[0].content }}", "{{ messages[0].content | int / 0 }}", "{{ 1 | tojson(2, 3, 4) }}"],
)
def test_values_that_a_template_was_not_written_for(template: str, folder: Path) -> None:
    with pytest.raises(RequestError, match="refuses this conversation"):
        Tokenizer(folder, template).apply_chat_template([{"role": "user", "content": 5}])


def test_missing_and_broken_tokenizers_are_typed_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(folder).apply_chat_template([])
    with pytest.raises(BundleError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path / "none")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer(folder)


@pytest.mark.parametrize("text", ["caf\udce9", None, ["a", "b"]])
def test_what_is_no_text_is_not_encoded(folder: Path, text: Any) -> None:
    with pytest.raises(RequestError, match="cannot be encoded"):
        Tokenizer(folder).encode(text)


@pytest.mark.parametrize("ids", [5, "abc", [-1], [1 << 40], [1.5], [[1, 2]]])
def test_what_are_no_token_ids_is_not_decoded(folder: Path, ids: Any) -> None:
    with pytest.raises(RequestError, match="one row"):
        Tokenizer(folder).decode(ids)
