"""``moec kit``: a bundle and all that runs it, for a machine that reaches nothing."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moec.artifacts.sizes import human_bytes
from moec.cli.options import bundle_argument, json_option
from moec.cli.output import StageLog, print_json
from moec.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.artifacts.files.manifest import Manifest

PARTS = ("bundle", "wheels", "install.sh", "run.sh")
"""Of a kit."""
LEAST_PYTHON = 11
"""Of CPython 3, the least that the runtime needs."""

INSTALL = """#!/bin/sh
# Make a Python environment beside this file from the wheels beside this file. No network is used.
# PYTHON names the interpreter, a CPython {python}; KIT_ENV the folder to make (default: env, here).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${{PYTHON:-python{python}}}
command -v "$python" >/dev/null || python=python3
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$found" != "{python}" ]; then
  echo "This kit is for Python {python}; $python is $found. Set PYTHON to a Python {python}." >&2
  exit 1
fi
env=${{KIT_ENV:-$here/env}}
rm -rf "$env"
options="--quiet --no-index --no-deps --disable-pip-version-check"
if "$python" -m venv "$env" >/dev/null 2>&1; then
  "$env/bin/python" -m pip install $options --find-links "$here/wheels" "$here"/wheels/*.whl
else
  # No venv module: the packages in a folder, found through PYTHONPATH.
  rm -rf "$env"
  mkdir -p "$env/bin"
  "$python" -m pip install $options --target "$env/site" "$here"/wheels/*.whl
  printf '#!/bin/sh\\nPYTHONPATH="%s" exec "%s" "$@"\\n' "$env/site" "$(command -v "$python")" >"$env/bin/python"
  chmod +x "$env/bin/python"
fi
"""

RUN = """#!/bin/sh
# The moec command with this kit's environment, which is made first where it is missing.
#   ./run.sh                                       continue a prompt with the bundle of this kit
#   ./run.sh generate bundle "Once upon a time"    any command and options, see ./run.sh --help
set -eu
here=$(cd "$(dirname "$0")" && pwd)
env=${{KIT_ENV:-$here/env}}
[ -x "$env/bin/python" ] || sh "$here/install.sh"
if [ $# -eq 0 ]; then
  set -- generate "$here/bundle" "Once upon a time" --device {device}
fi
exec "$env/bin/python" -m moec "$@"
"""


@click.command("kit", short_help="Make a folder that runs a bundle without a network.")
@bundle_argument
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option(
    "--python",
    default=f"{sys.version_info.major}.{sys.version_info.minor}",
    metavar="VERSION",
    help="CPython of the machine that it is for, such as 3.12.  [default: this one's]",
)
@click.option("--serve", is_flag=True, help="With what `moec serve` needs, 3 MB more.")
@click.option("--force", is_flag=True, help="Replace a kit that is there already.")
@json_option
def command(bundle: Path, output: Path, python: str, serve: bool, force: bool, as_json: bool) -> None:
    """Make a folder that runs BUNDLE on a Linux machine without any network.

    It holds the bundle, wheels of the runtime and of everything that it needs, and scripts that install them there.

    \b
    Example:
      moec kit dsv2.moec -o dsv2-kit --python 3.12
      (on the other machine)  dsv2-kit/run.sh generate dsv2-kit/bundle "Hello" --device cuda:0
    """
    from moec.artifacts.files.reader import read_manifest

    _check_python(python)
    manifest = read_manifest(bundle.absolute())
    log = StageLog()
    _check_output(output, bundle, force=force)
    with _whole(output) as folder:
        with log.stage("wheels"):
            _write_wheels(manifest, python, folder / "wheels", serve=serve)
        with log.stage("bundle"):
            shutil.copytree(bundle, folder / "bundle", copy_function=_link)
        cuda = any(target.kind == "cuda" for target in manifest.targets)
        for name, text in (("install.sh", INSTALL), ("run.sh", RUN)):
            path = folder / name
            path.write_text(text.format(python=python, device="cuda:0" if cuda else "cpu"))
            path.chmod(0o755)
    sizes = [sum(path.stat().st_size for path in (output / part).rglob("*")) for part in ("wheels", "bundle")]
    if as_json:
        print_json({"output": str(output), "wheel_bytes": sizes[0], "bundle_bytes": sizes[1]})
        return
    click.echo(
        f"{output}: {human_bytes(sizes[0])} of wheels, {human_bytes(sizes[1])} of bundle; run {output}/run.sh there"
    )


def _check_python(version: str) -> None:
    found = re.fullmatch(r"3\.(\d+)", version)
    if found is None or int(found[1]) < LEAST_PYTHON:
        raise click.BadParameter(
            f"{version} is no version of the form 3.12, from 3.{LEAST_PYTHON} on.", param_hint="--python"
        )


def _check_output(output: Path, bundle: Path, *, force: bool) -> None:
    """Raise `OutputError` where no kit can go, or something would be lost that is none."""
    if output.resolve().is_relative_to(bundle.resolve()) or bundle.resolve().is_relative_to(output.resolve()):
        raise OutputError(
            f"{output} and {bundle} lie in each other.",
            "A kit has a bundle of its own.",
            "Choose another output.",
        )
    if not os.path.lexists(output):
        return
    if not force:
        raise OutputError(f"{output} exists.", "A kit is a new folder.", "Choose another, or give --force.")
    if output.is_symlink() or not all((output / part).exists() for part in PARTS):
        raise OutputError(
            f"{output} exists and is not a kit.", "--force only replaces kits.", "Choose another output."
        )


@contextlib.contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that takes its name when all is in it, and is removed where that fails."""
    from moec.artifacts.files.writer import output_error

    partial = output.absolute().with_name(output.absolute().name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "wheels").mkdir(parents=True)
        yield partial
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    except OSError as error:
        raise output_error(output, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_wheels(manifest: Manifest, python: str, folder: Path, *, serve: bool) -> None:
    from moec.cli import wheels

    packages = list(wheels.RUNTIME_PACKAGES)
    if any(target.kind == "cuda" for target in manifest.targets):
        packages += wheels.CUDA_PACKAGES
    if serve:
        packages += wheels.SERVE_PACKAGES
    wheels.download(packages, python, platform.machine(), folder)
    for path in sorted(folder.glob("*.whl")):
        wheels.trim(path)
    for contents in (wheels.moec_wheel(), wheels.tvm_wheel()):
        wheels.write_wheel(contents, folder)


def _link(source: str, target: str) -> str:
    """A second name of the same file where the disk can do that (weights are large), else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
