"""``moec compile``: a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moec.cli.formats import UNROUNDED, read_fit, read_method, read_quantization
from moec.cli.options import json_option
from moec.cli.output import ProgressBar, StageLog
from moec.cli.summary import print_summary

if TYPE_CHECKING:
    from moec.compiler.request import Calibration, Surroundings

METHODS = ("feedback", "nearest")
"""Those of ``moec.formats``, which the command line does not load to show its help."""

output_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder to make."
)
force_option = click.option("--force", is_flag=True, help="Replace a bundle that is there already.")
calibration_option = click.option(
    "--calibration",
    metavar="FILE|none",
    help='Prompts to profile routing with, as JSON lines {"prompt": "..."} or {"token_ids": [...]}; '
    "none: do not profile.  [default: a shipped set]",
)


@click.command("compile", short_help="Make a bundle of a checkpoint, a GGUF file or a hub id.")
@click.argument("model")
@output_option
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("cpu",),
    show_default=True,
    metavar="T",
    help=(
        "cpu, cpu-x86-64-v3, cpu-x86-64-v4, cpu-x86-64-v4-vnni, cpu-x86-64-v4-bf16, cuda or cuda-sm_NN; "
        "may be given several times."
    ),
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "f16", "f32"]),
    help="Of stored weights; sums are float32 whatever it is.  [default: the checkpoint's]",
)
@click.option(
    "--max-context",
    type=click.IntRange(min=2),
    metavar="N",
    help="Most tokens of a sequence.  [default: the model's]",
)
@click.option(
    "--quantization",
    metavar="NAME|FILE",
    help="Store weights in fewer bits: a recipe by the name of its experts' format (int4, int8, int4-g128, ...), keep "
    "for what a quantized checkpoint has, none, or a file (docs/quantization.md).  [default: keep, where kernels can]",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help="How weights become codes: nearest rounds each by itself; feedback rounds routed experts by what enters them "
    "on the calibration prompts (docs/quantization.md).  [default: nearest, or what a file says]",
)
@click.option(
    "--fit",
    "target",
    metavar="SIZE|TIME",
    help="Choose formats by what they cost on the calibration prompts: the least loss with everything resident in "
    "a SIZE of GPU memory (of host memory where no target is a GPU), such as 8GiB; or with a decoded token in a TIME "
    "such as 20ms, by the cost model on --machine.",
)
@click.option(
    "--machine",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The machine that a TIME of --fit is for, as in examples/machines/.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="Take the tokenizer of this checkpoint.  [default: the model's own]",
)
@calibration_option
@click.option(
    "--modules-only", is_flag=True, help="Stop before the weights; `moec pack` adds them elsewhere."
)
@force_option
@click.option(
    "--dump-ir", type=click.Path(path_type=Path), metavar="DIR", help="Write the IR after each pass here."
)
@click.option(
    "--onnx", type=click.Path(path_type=Path), metavar="DIR", help="Write each distinct graph as ONNX here."
)
@json_option
def command(
    model: str,
    output: Path,
    targets: tuple[str, ...],
    dtype: str | None,
    max_context: int | None,
    quantization: str | None,
    method: str | None,
    target: str | None,
    machine: Path | None,
    tokenizer: Path | None,
    calibration: str | None,
    modules_only: bool,
    force: bool,
    dump_ir: Path | None,
    onnx: Path | None,
    as_json: bool,
) -> None:
    """Compile MODEL, a checkpoint's folder, a GGUF file or a hub id, into a bundle. No GPU is needed.

    Ends with a report of the memory that the bundle needs at several budgets. Interrupted, it goes on where the
    packing of weights stopped when it is run again.

    \b
    Example:
      moec compile examples/tiny-deepseek-v2 -o tiny.moec --target cpu
    """
    from moec.compiler.pipeline import compile_model
    from moec.compiler.request import CompileRequest

    request = CompileRequest(
        model=model,
        output=output,
        targets=targets,
        calibration=read_calibration(calibration),
        dtype=dtype,
        max_context=max_context,
        modules_only=modules_only,
        force=force,
        dump_ir=dump_ir,
        onnx=onnx,
        quantization=read_quantization(quantization),
        method=read_method(method, chosen=quantization not in UNROUNDED or target is not None),
        fit=read_fit(target, machine, quantization),
        tokenizer=tokenizer,
    )
    manifest = compile_model(request, surroundings())
    print_summary(output, manifest, as_json)


def surroundings() -> Surroundings:
    """Logs and progress on stderr, the runtime as probe, the common machines."""
    from moec.cli.probe import RuntimeProbe
    from moec.compiler.request import Surroundings
    from moec.planning.machines import common_machines

    return Surroundings(StageLog(), ProgressBar("pack"), RuntimeProbe(), common_machines())


def read_calibration(option: str | None) -> Calibration:
    """``--calibration`` as a record."""
    from moec.compiler.profiling.calibration import read_prompts
    from moec.compiler.request import Calibration

    if option == "none":
        return Calibration(enabled=False)
    return Calibration(prompts=None if option is None else read_prompts(Path(option)))
