from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, click, sys
from benchmarks.support.profiled import run_and_leave
atexit.register(print, "at exit")

@click.command()
@click.argument("code", type=int)
def main(code):
    print("done", end="")
    if code:
        sys.exit(code)

run_and_leave(main)
"""


@pytest.mark.parametrize("code", [0, 3])
def test_the_process_ends_where_the_command_does(code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(code)], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (code, "done"), done.stderr


def test_what_the_command_says_of_wrong_options_is_seen() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "many"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "not a valid integer" in done.stderr
