"""Options that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

if TYPE_CHECKING:
    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.traces import Traces

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")

threads_option = click.option(
    "--cpu-threads",
    type=click.IntRange(min=0),
    default=None,
    help="Threads to compute with; beside GPUs a share of the experts that they lack, 0: none.  [default: all cores]",
)

device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    help="cpu, cuda:0 for the first GPU, or cuda:0,cuda:1 to divide the layers among several.",
)

device_memory_option = click.option(
    "--device-memory",
    metavar="SIZE",
    default=None,
    help="Most GPU memory to use: bytes, 8GiB, or a share such as 0.75. Of several GPUs: of each, or one amount for "
    "each, such as 8GiB,6GiB.  [default: what is free]",
)

host_memory_option = click.option(
    "--host-memory",
    metavar="SIZE",
    default=None,
    help="Most host memory to use: bytes, 8GiB, or a share of all memory such as 0.75.",
)

traces_option = click.option(
    "--traces",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="Routing recorded while generating, to learn from besides the bundle's own.",
)

trace_path_option = click.option(
    "--trace-path",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="Keep the routing of what is run in this file, for `moec plan --traces`.",
)

prefetch_option = click.option(
    "--prefetch/--no-prefetch",
    default=None,
    help="Bring likely experts before they are chosen.  [default: as the schedule says]",
)

copy_thread_option = click.option(
    "--copy-thread/--no-copy-thread",
    default=None,
    help="Have a CPU thread feed the GPU's copy engine with missing experts.  "
    "[default: where --cpu-threads have nothing to compute]",
)

prefix_caching_option = click.option(
    "--prefix-caching/--no-prefix-caching",
    default=None,
    help="Take over what the key-value cache holds of a prompt's beginning instead of running it again.  "
    "[default: where the model can]",
)

seed_option = click.option("--seed", type=int, default=None, help="Makes sampling repeatable.")

NEW_TOKENS = 128

max_new_tokens_option = click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Most tokens to generate.  [default: {NEW_TOKENS}, or what the context holds]",
)


stop_option = click.option(
    "--stop",
    "stops",
    multiple=True,
    metavar="TEXT",
    help="End before this text; may be given several times.",
)


class ProcessorOptions(TypedDict):
    """The values of `processor_options`, as ``runtime.load`` takes them."""

    device: str
    device_memory: str | None
    host_memory: str | None
    cpu_threads: int | None
    copy_thread: bool | None


class LoadOptions(ProcessorOptions):
    """Those of `routing_options` besides."""

    prefetch: bool | None
    trace_path: Path | None


def processor_options(command: click.decorators.FC) -> click.decorators.FC:
    """What a bundle may run on: ``--device``, its memory and the host's, threads of the CPU."""
    for option in (
        device_memory_option,
        device_option,
        host_memory_option,
        copy_thread_option,
        threads_option,
    ):
        command = option(command)
    return command


def routing_options(command: click.decorators.FC) -> click.decorators.FC:
    """``--prefetch``, ``--trace-path``: what is done with the routing of what runs."""
    for option in (trace_path_option, prefetch_option):
        command = option(command)
    return command


def sampling_options(command: click.decorators.FC) -> click.decorators.FC:
    """``--temperature``, ``--top-p``, ``--top-k``, ``--repetition-penalty``, ``--greedy``, ``--seed``."""
    for option in (
        seed_option,
        click.option("--greedy", is_flag=True, help="Always take the likeliest token."),
        click.option("--repetition-penalty", type=float, default=None, help="Above 1: repeat less."),
        click.option("--top-k", type=int, default=None, help="Sample among the K likeliest tokens; 0: all."),
        click.option(
            "--top-p", type=float, default=None, help="Sample among the likeliest tokens of this mass."
        ),
        click.option("--temperature", type=float, default=None, help="Sample, with logits divided by this."),
    ):
        command = option(command)
    return command


MOST_TOKENS = 1 << 16
"""Traced tokens that are kept; the oldest sequences go first."""


def learned_traces(bundle: Bundle, path: Path | None) -> Traces | None:
    """The bundle's traces, and behind them those of ``path`` where it is given and they are not in it yet.

    Raises:
        BundleError: the file is damaged, or of another model.
    """
    from moec.artifacts.files.traces import load_traces
    from moec.artifacts.traces import ends_with, join_traces, last_tokens
    from moec.planning.routing.sides import sides_of

    own = bundle.traces()
    if path is None:
        return own
    recorded = load_traces(path)
    sides_of(recorded, bundle.model)
    if own is None or ends_with(own, recorded):
        return own or recorded
    return last_tokens(join_traces(own, recorded), MOST_TOKENS)
