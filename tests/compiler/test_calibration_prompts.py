"""Files of calibration prompts: what is refused, and that what is advised then is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moec.compiler.profiling.calibration import read_prompts
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
