"""Commands that end with an error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moec.__main__ import run

if TYPE_CHECKING:
    import pytest

    from moec import errors

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v2"
MACHINE = str(EXAMPLE.parent / "machines" / "cpu-2core.json")
GPU_MACHINE = str(EXAMPLE.parent / "machines" / "rtx-4060-laptop-8gb.json")


def expect(arguments: list[str], kind: type[errors.MoecError], capsys: pytest.CaptureFixture[str]) -> str:
    """Run and check the exit code; give what was said on stderr."""
    assert run(arguments) == kind.exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: " in captured.err
    return captured.err
