"""Python in the documentation runs as it stands, over the shipped example."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples" / "tiny-deepseek-v2")


def python_of(document: str) -> str:
    found = re.search(
        r"^```python\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert found is not None
    return found[1]


def test_the_readme(
    example_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dsv2.moec").symlink_to(example_bundle)
    monkeypatch.chdir(tmp_path)
    exec(compile(python_of("README.md"), "README.md", "exec"), {})
    assert "Why is the sky blue?" in capsys.readouterr().out


def test_coming_from_moe_infinity(example_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = python_of("docs/from-moe-infinity.md")
    for shown, here in (
        ('"deepseek-ai/DeepSeek-V2-Lite-Chat"', repr(EXAMPLE)),
        ("MoE(checkpoint", f"MoE({str(example_bundle)!r}"),
    ):
        assert shown in code
        code = code.replace(shown, here)
    exec(compile(code, "docs/from-moe-infinity.md", "exec"), {})
    assert "How old are you?" in capsys.readouterr().out
