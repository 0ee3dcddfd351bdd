"""``moec simulate``: routing traces through policies, budgets and the cost models of machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moec.artifacts.sizes import human_bytes
from moec.cli.options import bundle_argument, json_option, traces_option
from moec.cli.output import policy_name, print_json, print_table, write_page

if TYPE_CHECKING:
    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.traces import Traces
    from moec.planning.simulator import Simulation

SHOWN_SHARES = (0.1, 0.25, 0.5, 0.75)
"""Of the experts: the columns of the printed tables."""
DRAWN_POLICIES = 3
SYNTHETIC_TOKENS = 2048


@click.command("simulate", short_help="Compare cache policies, budgets and machines on traces.")
@bundle_argument
@traces_option
@click.option(
    "--synthetic",
    type=click.Choice(["skewed", "topical", "scattered"]),
    help="Made-up traces instead: uneven steady use, use that follows a topic, or independent tokens.",
)
@click.option(
    "--tokens", type=click.IntRange(min=8), help=f"Of made-up traces.  [default: {SYNTHETIC_TOKENS}]"
)
@click.option(
    "--machine",
    "machines",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Machine descriptions to predict speeds for.  [default: those that moec ships]",
)
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="Draw the curves into this page."
)
@json_option
def command(
    bundle: Path,
    traces: Path | None,
    synthetic: str | None,
    tokens: int | None,
    machines: tuple[Path, ...],
    html: Path | None,
    as_json: bool,
) -> None:
    """Replay routing traces of BUNDLE's model through every cache policy, at budgets from no expert to all.

    Compares with Belady's optimum, and predicts milliseconds a token for each machine. No weight is read.

    \b
    Example:
      moec simulate dsv2.moec --html dsv2.html
    """
    from moec.artifacts.files.codec import to_json
    from moec.artifacts.files.reader import open_bundle
    from moec.artifacts.files.records import read_machine
    from moec.planning.machines import common_machines
    from moec.planning.simulator import simulate

    if synthetic is None and tokens is not None:
        raise click.UsageError("--tokens needs --synthetic")
    if synthetic is not None and traces is not None:
        raise click.UsageError("--synthetic and --traces cannot be given together")
    opened = open_bundle(bundle, verify="sizes")
    chosen, source = _traces(opened, traces, synthetic, tokens or SYNTHETIC_TOKENS)
    described = tuple(map(read_machine, machines)) or _runnable(opened, common_machines())
    result = simulate(chosen, opened.model, described)
    if html is not None:
        write_page(html, render(result, opened.manifest.model_name, source))
    if as_json:
        print_json({"traces": source, **to_json(result)})
    else:
        _print(result, source)


def _traces(opened: Bundle, path: Path | None, synthetic: str | None, tokens: int) -> tuple[Traces, str]:
    from moec.cli.options import learned_traces
    from moec.errors import BundleError
    from moec.planning.routing import synthetic as routings

    if synthetic is not None:
        routing = {
            "skewed": routings.SKEWED,
            "topical": routings.TOPICAL,
            "scattered": routings.SCATTERED,
        }[synthetic]
        shapes = [(layer.experts, layer.top_k) for layer in opened.model.experts]
        return routings.zipf_traces(shapes, tokens, routing), f"{synthetic} (made up)"
    traces = learned_traces(opened, path)
    if traces is None or traces.tokens == 0:
        raise BundleError(
            f"{opened.path} has no routing traces."
            if path is None
            else f"{path} has no tokens, nor has the bundle.",
            "It was compiled without calibration.",
            "Give --traces FILE (`trace_path=` of moec.runtime.load records them), or --synthetic.",
        )
    return traces, "the bundle's" if path is None else f"the bundle's and {path.name}"


def _runnable(opened: Bundle, machines: tuple[MachineRecord, ...]) -> tuple[MachineRecord, ...]:
    """Machines of a kind that some target of the bundle is for; all where it has none of a GPU's."""
    kinds = {target.kind for target in opened.manifest.targets}
    fitting = [each for each in machines if ("cpu" if each.gpu_name is None else "cuda") in kinds]
    return tuple(machines if kinds == {"cpu"} else fitting)


def _columns(result: Simulation) -> list[int]:
    return [result.shares.index(share) for share in SHOWN_SHARES]


def _print(result: Simulation, source: str) -> None:
    columns = _columns(result)
    click.echo(f"{result.tokens} tokens, traces: {source}")
    click.echo(f"a token shares {result.overlap:.2f} of its experts with the one before it")
    click.echo("\nhit rate (and share of Belady's optimum), by the share of experts with a slot")
    header = [f"{share:.0%}" for share in SHOWN_SHARES]
    rows = [
        (policy_name(each.policy), *(f"{each.hit_rates[c]:.3f} ({each.of_optimal[c]:.2f})" for c in columns))
        for each in result.policies
    ]
    bounds = [
        (name, *(f"{rates[c]:.3f} ({rates[c] / (result.optimal[c] or 1.0):.2f})" for c in columns))
        for name, rates in (("best fixed set", result.fixed), ("optimum", result.optimal))
    ]
    print_table(("policy", *header), [*rows, *bounds])
    _print_guesses(result, columns, header)
    click.echo("\npredicted ms/token under the best policy")
    sizes = [human_bytes(result.expert_bytes[c]) for c in columns]
    print_table(
        ("machine", *(f"{share} ({size})" for share, size in zip(header, sizes, strict=True))),
        [(each.machine, *(f"{each.milliseconds[c]:.2f}" for c in columns)) for each in result.machines],
    )


def _print_guesses(result: Simulation, columns: list[int], header: list[str]) -> None:
    if not result.guesses:
        return
    click.echo("\nguesses of the next layer's experts: recall of all, and of those without a slot")
    click.echo("(in brackets: how often the likeliest without a slot is chosen)")
    rows = [
        (
            each.source,
            f"{each.recall:.2f}",
            *(f"{each.missing[c]:.2f} ({each.first_right[c]:.2f})" for c in columns),
        )
        for each in result.guesses
    ]
    print_table(("guess", "all", *header), rows)


def render(result: Simulation, model: str, source: str) -> str:
    """The curves as a page."""
    from moec.cli.pages.chart import Line, chart
    from moec.cli.pages.page import page, section, table

    percent = tuple(100 * share for share in result.shares)
    hits = [
        Line("Belady's optimum", percent, result.optimal, dashed=True),
        Line("best fixed set, in hindsight", percent, result.fixed, dashed=True),
    ]
    hits += [
        Line(policy_name(each.policy), percent, each.hit_rates) for each in result.policies[:DRAWN_POLICIES]
    ]
    drawn = {line.name for line in hits}
    hits += [
        Line(policy_name(each.policy), percent, each.hit_rates)
        for each in result.policies
        if each.policy.name in ("lru", "static") and policy_name(each.policy) not in drawn
    ][:2]
    times = [Line(each.machine, percent, each.milliseconds) for each in result.machines]
    columns = _columns(result)
    header = ("policy", *(f"{share:.0%}" for share in SHOWN_SHARES))
    rows = [
        (policy_name(each.policy), *(f"{each.hit_rates[c]:.3f} ({each.of_optimal[c]:.2f})" for c in columns))
        for each in result.policies
    ]
    share = "experts in the fastest tier, % of their bytes"
    return page(
        f"{model}: policies and budgets",
        [
            section(
                "Hit rate over budgets",
                f"{result.tokens} tokens; traces: {source}. A token shares {result.overlap:.2f} of its experts with "
                "the one before it. Each policy is replayed on tokens that its profile does not know. "
                "If better: a missed expert takes a slot only from one with a lesser score.",
                chart(hits, share, "hit rate"),
                table(header, rows),
            ),
            section(
                "Predicted speed over budgets",
                "Milliseconds of a decoded token at batch 1 under the best policy, by the cost model and the "
                "machine's figures; experts without a slot are in host memory (without a GPU: in the file).",
                chart(times, share, "ms/token", logarithmic=True),
                table(
                    ("machine", *(f"{each:.0%}" for each in SHOWN_SHARES)),
                    [(m.machine, *(f"{m.milliseconds[c]:.2f}" for c in columns)) for m in result.machines],
                ),
            ),
        ],
    )
