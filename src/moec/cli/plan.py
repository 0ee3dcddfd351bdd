"""``moec plan``: make a schedule for other budgets or another machine; no compiler is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moec.artifacts.sizes import human_bytes
from moec.cli.options import (
    bundle_argument,
    copy_thread_option,
    json_option,
    learned_traces,
    traces_option,
)
from moec.cli.output import policy_name, print_json
from moec.errors import BudgetError, DeviceError, MissingDependencyError, RequestError

if TYPE_CHECKING:
    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.schedule import PrefetchPlan, Schedule
    from moec.planning.division import GpuPart
    from moec.planning.routing.analysis import Analysis


@click.command("plan", short_help="Plan where experts go, from routing traces and budgets.")
@bundle_argument
@click.option(
    "--machine", type=click.Path(path_type=Path), help="A machine description.  [default: measure this one]"
)
@click.option(
    "--device-memory",
    metavar="SIZE",
    help="GPU memory to plan for: bytes, 6GiB, or a share such as 0.5; of several GPUs one for each: 8GiB,8GiB.",
)
@click.option("--host-memory", metavar="SIZE", help="Host memory to plan for, likewise.")
@copy_thread_option
@traces_option
@click.option("--dry-run", is_flag=True, help="Print the schedule and leave the bundle as it is.")
@json_option
def command(
    bundle: Path,
    machine: Path | None,
    device_memory: str | None,
    host_memory: str | None,
    copy_thread: bool | None,
    traces: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Plan where the experts of BUNDLE go within these budgets, from the routing traces kept in it.

    The schedule is added to the bundle; one for the same machine and budgets is replaced. Traces that are given are
    kept in the bundle as well, and its other schedules are made anew from all of them.

    \b
    Example:
      moec plan dsv2.moec --machine examples/machines/rtx-4060-laptop-8gb.json --device-memory 6GiB
      moec plan dsv2.moec --device-memory 8GiB,8GiB
    """
    from moec.artifacts.files.codec import to_json
    from moec.artifacts.files.reader import open_bundle
    from moec.artifacts.files.update import add_schedule
    from moec.planning.machines import budgets_for
    from moec.planning.planner import plan_analysed
    from moec.planning.routing.analysis import analyse
    from moec.planning.several import planned_division, several_gpus

    opened = open_bundle(bundle, verify="sizes")
    several = device_memory is not None and "," in device_memory
    if several and copy_thread:
        raise RequestError(
            "--copy-thread does not go with several GPUs.",
            "A thread of the CPU feeds the copy engine of one GPU only.",
            "Leave it out, or plan for one GPU.",
        )
    described = _describe(machine, opened, False if several and machine is None else copy_thread)
    if device_memory is not None and described.gpu_name is None:
        raise DeviceError(
            f"{described.name} has no GPU to give --device-memory of.",
            "The machine to plan for is this one, or the one that --machine describes.",
            "Describe the machine you mean with --machine FILE (see examples/machines/), or leave the option out.",
        )
    sizes = _sizes(device_memory, described.gpu_memory_bytes)
    described = several_gpus(described, max(1, len(sizes)))
    budgets = budgets_for(
        described,
        opened.model,
        sum(sizes) if sizes else None,
        None if host_memory is None else _size(host_memory, described.host_memory_bytes, "--host-memory"),
    )
    learned = learned_traces(opened, traces)
    analysis = analyse(learned, opened.model)
    schedule = plan_analysed(analysis, opened.model, budgets, described)
    parts = planned_division(opened.model, analysis, schedule, sizes) if len(sizes) > 1 else ()
    if not dry_run and traces is None:
        add_schedule(opened, schedule)
    elif not dry_run:
        _learn(opened, analysis, schedule)
    if as_json:
        print_json(to_json(schedule) | ({"gpus": [_part_facts(part) for part in parts]} if parts else {}))
    else:
        _print(schedule)
        for number, part in enumerate(parts):
            click.echo(
                f"cuda:{number:<7} layers {part.layers.start} to {part.layers.stop - 1}: "
                f"{human_bytes(part.kept_bytes)} of {human_bytes(part.expert_bytes)} experts, "
                f"{human_bytes(part.fixed_bytes)} other weights and cache"
            )


def _learn(opened: Bundle, analysis: Analysis, schedule: Schedule) -> None:
    """Keep the traces, and make the bundle's other schedules anew from them."""
    from moec.artifacts.files.update import replace_schedules, same_place
    from moec.artifacts.schedule import ScheduleRecord
    from moec.planning.planner import plan_analysed

    others = [
        plan_analysed(analysis, opened.model, other.budgets, other.machine)
        for other in opened.schedule.schedules
        if not same_place(other, schedule)
    ]
    replace_schedules(opened, ScheduleRecord(analysis.profile, (*others, schedule)), analysis.traces)


def _describe(machine: Path | None, bundle: Bundle, copy_thread: bool | None) -> MachineRecord:
    from moec.artifacts.files.records import read_machine
    from moec.artifacts.layout.footprint import footprint
    from moec.planning.costs.token import cpu_has_share
    from moec.runtime.devices.cuda.measure import FED_LEAST_BYTES, FED_LINK_EFFICIENCY
    from moec.runtime.devices.measure import gpu_records, this_machine
    from moec.runtime.machine.threads import helper_threads
    from moec.runtime.sharing.alone import team_speed

    if machine is not None:
        if copy_thread is not None:
            raise RequestError(
                "--copy-thread says nothing of a machine that is described.",
                "At what share of the link's speed its missing experts come is the description's link_efficiency.",
                "Leave one of --machine and --copy-thread out.",
            )
        return read_machine(machine)
    try:
        gpus = gpu_records()
    except (DeviceError, MissingDependencyError):
        gpus = []
    if not gpus:
        return this_machine(bundle.path)
    team = team_speed(bundle, helper_threads(fed=bool(copy_thread)))
    described = this_machine(bundle.path, gpu=gpus[0], team=team, fed=bool(copy_thread))
    facts = footprint(bundle.model)
    large = max(layer.stride_bytes for layer in facts.layers) >= FED_LEAST_BYTES if facts.layers else False
    if copy_thread is None and team is not None and large and not cpu_has_share(described, facts):
        return replace(described, link_efficiency=FED_LINK_EFFICIENCY)
    return described


def _size(text: str, total_bytes: int, name: str) -> int:
    from moec.runtime.memory.budget import parse_memory

    size = parse_memory(text, total_bytes, name)
    if size > total_bytes:
        raise BudgetError(
            f"{name} {text} is more than the machine has.",
            f"It has {human_bytes(total_bytes)}.",
            "Ask for less, or describe another machine with --machine.",
        )
    return size


def _sizes(text: str | None, total_bytes: int) -> list[int]:
    """Of each GPU; none where nothing is said."""
    return [] if text is None else [_size(each, total_bytes, "--device-memory") for each in text.split(",")]


def _part_facts(part: GpuPart) -> dict[str, int]:
    return {
        "first_layer": part.layers.start,
        "last_layer": part.layers.stop - 1,
        "fixed_bytes": part.fixed_bytes,
        "expert_bytes": part.expert_bytes,
        "kept_expert_bytes": part.kept_bytes,
    }


def _print(schedule: Schedule) -> None:
    prediction = schedule.prediction
    click.echo(f"machine      {schedule.machine.name} ({schedule.machine.source})")
    for name, tier, budget in (
        ("device", schedule.device, schedule.budgets.device_memory_bytes),
        ("host", schedule.host, schedule.budgets.host_memory_bytes),
    ):
        click.echo(
            f"{name:<12} {human_bytes(tier.total)} of {human_bytes(budget)}, {human_bytes(tier.experts)} experts"
        )
    click.echo(
        f"slots        {' '.join(str(layer.slots) for layer in schedule.layers)} (experts a layer, on the GPU)"
    )
    click.echo(f"host experts {' '.join(str(layer.host_experts) for layer in schedule.layers)}")
    share = [layer.cpu_share for layer in schedule.layers][:1]
    if schedule.device.total and share and any(share[0]):
        shares = ", ".join(f"{count} of {misses}" for misses, count in enumerate(share[0]) if misses)
        click.echo(f"misses       the CPU computes {shares} (first MoE layer)")
    click.echo(f"policy       {policy_name(schedule.policy)}")
    if schedule.device.total:
        prefill = schedule.prefill
        streamed = prefill.streamed_from_tokens <= schedule.budgets.step_tokens
        how = (
            f"streamed from {prefill.streamed_from_tokens} tokens a step"
            if streamed
            else "run from the slots"
        )
        click.echo(f"prefill      experts {how}")
        click.echo(
            f"             {prefill.milliseconds_per_step:.1f} ms for a step of {schedule.budgets.step_tokens} tokens"
        )
    _print_prefetch(schedule.prefetch)
    click.echo(
        f"predicted    hit rate {prediction.hit_rate:.2f} (optimum {prediction.optimal_hit_rate:.2f}), "
        f"{prediction.milliseconds_per_token:.2f} ms/token ({prediction.resident_milliseconds:.2f} with all resident)"
    )


def _print_prefetch(prefetch: PrefetchPlan) -> None:
    for figures in prefetch.candidates:
        is_on = figures.source == prefetch.source
        state = f"on, {human_bytes(prefetch.bytes_per_layer)} a layer" if is_on else "off"
        wasted, fetched = int(figures.wasted_bytes_per_token), int(figures.fetched_bytes_per_token)
        click.echo(
            f"prefetch     by {figures.source} ({state}): {-figures.gain_milliseconds:+.2f} ms/token, "
            f"recall {figures.recall:.2f}, {human_bytes(wasted)} of {human_bytes(fetched)} wasted"
        )
