"""Files of calibration prompts: what is refused, and that what is advised then is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moec.compiler.profiling.calibration import Prompt, read_prompts
from moec.errors import CheckpointError


@pytest.mark.parametrize(
    "content", ["", '{"Prompt": "text"}\n', '{"prompt": 3}\n', "text\n", '{"token_ids": []}\n']
)
def test_the_lines_that_a_message_shows_are_prompts(content: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="calibration prompt") as error:
        read_prompts(path)
    shown = re.findall(r"\{.*?\}", error.value.do)
    path.write_text("\n".join(shown))
    assert len(read_prompts(path)) == len(shown) > 0


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "one\u2028line"}\r\n\n{"token_ids": [1]}'.encode())
    assert read_prompts(path) == (Prompt("one\u2028line", None), Prompt(None, (1,)))
