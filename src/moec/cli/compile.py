"""``moec compile``: a checkpoint to a bundle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.cli.options import json_option
from moec.cli.output import ProgressBar, StageLog, human_bytes, print_json, print_table

if TYPE_CHECKING:
    from moec.artifacts.manifest import Manifest
    from moec.artifacts.quantization import Quantization
    from moec.compiler.fitting import FitRequest
    from moec.compiler.request import Calibration, Surroundings

METHODS = ("feedback", "nearest")
"""Those of ``moec.formats``, which the command line does not load to show its help."""

UNROUNDED = (None, "none", "keep")
"""What of ``--quantization`` rounds nothing."""

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


@click.command("compile")
@click.argument("model")
@output_option
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("cpu",),
    show_default=True,
    metavar="T",
    help="cpu, cpu-x86-64-v3, cpu-x86-64-v4, cuda or cuda-sm_NN; may be given several times.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "f16", "f32"]),
    help="Of stored weights; arithmetic is float32.  [default: the checkpoint's]",
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


def read_quantization(option: str | None) -> Quantization | None:
    """``--quantization`` as a policy."""
    from moec.compiler.quantization import POLICIES, policy_named, read_policy

    if option is None:
        return None
    if option in POLICIES:
        return policy_named(option)
    if not Path(option).is_file():
        raise click.BadParameter(
            f"{option} is neither a file nor one of {', '.join(POLICIES)}.", param_hint="--quantization"
        )
    return read_policy(Path(option))


def read_method(method: str | None, *, chosen: bool) -> str | None:
    """``--method``; ``CompileError`` where nothing says which weights get codes."""
    from moec.errors import CompileError

    if method is not None and not chosen:
        raise CompileError(
            "--method has nothing to say here.",
            "Without --fit or a format for --quantization what a checkpoint has is kept, and nothing is rounded.",
            "Add --quantization with a format such as int4, or leave --method out.",
        )
    return method


def read_fit(target: str | None, machine: Path | None, quantization: str | None) -> FitRequest | None:
    """``--fit`` and ``--machine`` as a record.

    Raises:
        CompileError: a time has no machine, or a size has one, or formats are named too.
        RequestError: it is neither a size nor a time.
    """
    from moec.artifacts.records import read_machine
    from moec.compiler.fitting import FitRequest
    from moec.errors import CompileError
    from moec.runtime.memory.budget import parse_memory

    if target is None:
        if machine is not None:
            raise CompileError(
                "--machine has nothing to say without --fit.",
                "It is the machine that a time per token is predicted for.",
                "Add --fit with a time such as 20ms, or leave --machine out.",
            )
        return None
    if quantization is not None:
        raise CompileError(
            "--fit and --quantization cannot be given together.",
            "Each of them says the formats of all weights.",
            "Leave one of them out.",
        )
    time = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*ms\s*", target)
    if time is None:
        if machine is not None:
            raise CompileError(
                f"--fit {target} is a size, and needs no --machine.",
                "Whether everything fits a size does not depend on a machine's speeds.",
                "Leave --machine out, or ask for a time such as --fit 20ms.",
            )
        return FitRequest(target, limit_bytes=parse_memory(target, 0, "--fit"))
    if machine is None:
        raise CompileError(
            f"--fit {target} is a time, and there is no machine that it is for.",
            "How long a token takes depends on a machine's memory and speeds.",
            "Add --machine FILE: examples/machines/ has some, and `moec plan` measures this one.",
        )
    return FitRequest(target, milliseconds=float(time[1]), machine=read_machine(machine))


def print_summary(output: Path, manifest: Manifest, as_json: bool) -> None:
    """Say what was made, and for a bundle what memory it needs."""
    total = sum(record.size_bytes for record in manifest.files.values())
    rows = memory_rows(output) if manifest.contents == "bundle" else []
    if as_json:
        facts = {"path": str(output), "contents": manifest.contents, "bytes": total}
        print_json(facts | {"targets": [target.name for target in manifest.targets], "memory": rows})
        return
    names = ", ".join(target.name for target in manifest.targets)
    click.echo(
        f"{output}: {manifest.contents} of {manifest.model_name}, {human_bytes(total)}, targets {names}"
    )
    if rows:
        click.echo("\nmemory it needs, by the share of routed experts kept in the fastest tier:")
        header = ("machine", "experts kept", "GPU memory", "host memory", "hit rate", "ms/token (floor)")
        print_table(header, [_memory_cells(row) for row in rows])


def memory_rows(output: Path) -> list[dict[str, Any]]:
    """The memory report of a finished bundle, as JSON values."""
    from moec.artifacts.codec import to_json
    from moec.artifacts.reader import open_bundle
    from moec.planning.analysis import analyse
    from moec.planning.machines import common_machines
    from moec.planning.report import memory_report
    from moec.planning.shares import share_budgets

    bundle = open_bundle(output, verify="sizes")
    kinds = {target.kind for target in bundle.manifest.targets}
    pairs = share_budgets(bundle.model, common_machines(), kinds)
    return [
        to_json(row) for row in memory_report(analyse(bundle.traces(), bundle.model), bundle.model, pairs)
    ]


def _memory_cells(row: dict[str, Any]) -> tuple[str, ...]:
    kept = row["slots"] if row["device_memory_bytes"] else row["host_experts"]
    return (
        row["machine"],
        f"{kept} of {row['experts']}",
        human_bytes(row["device_used_bytes"]) if row["device_memory_bytes"] else "-",
        human_bytes(row["host_used_bytes"]),
        f"{row['hit_rate']:.2f}",
        f"{row['milliseconds_per_token']:.2f}",
    )
