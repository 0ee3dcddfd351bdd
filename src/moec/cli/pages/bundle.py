"""The page of ``moec inspect --html``: where experts lie, who follows whom, memory and speed."""

from __future__ import annotations

from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.sizes import human_bytes
from moec.cli.output import policy_name
from moec.cli.pages.chart import Line, chart
from moec.cli.pages.heatmap import heat_map, shades, stacked_bars
from moec.cli.pages.page import page, section, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.model import ModelRecord
    from moec.artifacts.schedule import RoutingProfile, Schedule, TierBytes
    from moec.artifacts.traces import Traces

TIERS = (("slot on the GPU", "#2f6fde"), ("host memory", "#2a9d63"), ("file", "#d9622b"))
PARTS = ("dense weights", "key-value cache", "activations", "tables", "stream", "experts")
MOST_PAIRS = 12
"""Pairs of layers whose transitions are drawn; with more layers, evenly spread ones."""
MOST_LIFT = 4.0
"""How many times likelier than usual is drawn in the full colour."""


def bundle_page(bundle: Bundle) -> str:
    """The whole page."""
    model, profile, schedules = bundle.model, bundle.schedule.profile, bundle.schedule.schedules
    parts = [_facts(bundle), _placement(profile, schedules)]
    traces = bundle.traces()
    if traces is not None:
        parts += _transitions(traces, model, profile)
    if schedules:
        parts += [_memory(schedules), _speed(schedules), _prefetch(schedules)]
    return page(f"{bundle.manifest.model_name} ({model.class_name})", parts)


def _facts(bundle: Bundle) -> str:
    model, manifest = bundle.model, bundle.manifest
    experts = sum(layer.experts for layer in model.experts)
    sizes = {name: record.size_bytes for name, record in manifest.files.items()}
    held = sum(size for name, size in sizes.items() if name.startswith("weights/experts"))
    profile = bundle.schedule.profile
    rows = [
        ("size", human_bytes(sum(sizes.values()))),
        ("routed experts", f"{experts} in {len(model.experts)} MoE layers, {human_bytes(held)}"),
        ("stored as", ", ".join(manifest.formats)),
        ("checkpoint", ", ".join(manifest.checkpoint_types)),
        ("targets", ", ".join(target.name for target in manifest.targets)),
        ("routing", f"{profile.provenance}, {profile.tokens} tokens of {profile.sequences} sequences"),
    ]
    return table(("", ""), rows)


def _placement(profile: RoutingProfile, schedules: Sequence[Schedule]) -> str:
    legend = " ".join(f'<span style="color:{colour}">■</span> {name}' for name, colour in TIERS)
    maps = [f"<p>{legend}</p>"]
    alike: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for schedule in schedules:
        counts = tuple((layer.slots, layer.host_experts) for layer in schedule.layers)
        name = f"{schedule.machine.name} ({_budgets(schedule)}; {policy_name(schedule.policy)})"
        alike.setdefault(counts, []).append(name)
    for counts, names in alike.items():
        maps.append(f'<p class="note">{escape(", ".join(names))}</p>')
        maps.append(heat_map(_placed(profile, counts), "experts, the most used first", "MoE layer", names[0]))
    if not schedules:
        counts = tuple((0, len(layer.order)) for layer in profile.layers)
        maps.append(heat_map(_placed(profile, counts), "experts, the most used first", "MoE layer", "use"))
    return section(
        "Where experts lie",
        "A row for each MoE layer, a cell for each expert. The colour says on which tier it lies to begin with, its "
        "strength how many of the traced tokens chose it (full: as many as the most used expert of all layers).",
        *maps,
    )


def _placed(profile: RoutingProfile, counts: Sequence[tuple[int, int]]) -> NDArray[np.uint8]:
    """Colours ``[layers, experts, 3]``; layers with fewer experts end early."""
    widest = max((len(layer.order) for layer in profile.layers), default=1)
    most = max((layer.use_share[0] for layer in profile.layers), default=1.0) or 1.0
    colours = np.full((max(1, len(profile.layers)), widest, 3), 128, np.uint8)
    for row, (layer, (slots, hosted)) in enumerate(zip(profile.layers, counts, strict=True)):
        strength = np.array(layer.use_share) / most
        rank = np.arange(len(strength))
        tier = np.where(rank < slots, 0, np.where(rank < hosted, 1, 2))
        for number, (_, colour) in enumerate(TIERS):
            own = np.flatnonzero(tier == number)
            colours[row, own] = shades(strength[own], colour)
    return colours


def _transitions(traces: Traces, model: ModelRecord, profile: RoutingProfile) -> list[str]:
    from moec.planning.routing.sides import layer_traces, sides_of
    from moec.planning.routing.transitions import joint_counts

    sides = sides_of(traces, model)
    pairs = [pair for side in sides for pair in pairwise(side.layers)]
    if not pairs:
        return []
    drawn = np.unique(
        np.linspace(0, len(pairs) - 1, min(len(pairs), MOST_PAIRS)).round().astype(int)
    ).tolist()
    traced, maps = layer_traces(sides), []
    for layer, next_layer in (pairs[number] for number in drawn):
        here, after = traced[layer], traced[next_layer]
        together = joint_counts(here.chosen, here.experts, after.chosen, after.experts).astype(np.float64)
        expected = together.sum(axis=1, keepdims=True) * together.sum(axis=0) / max(1.0, together.sum())
        lift = np.divide(together, expected, out=np.zeros_like(together), where=expected > 0)
        order, following = (list(profile.layers[number].order) for number in (layer, next_layer))
        colours = shades(lift[np.ix_(order, following)] / MOST_LIFT, "#a34bc4")
        name = f"layer {layer} to {next_layer}"
        maps.append(heat_map(colours, f"experts of layer {next_layer}", f"of layer {layer}", name))
    return [
        section(
            "Who follows whom",
            "How much likelier than usual a token that chose an expert of one layer (row) chooses one of the next "
            f"(column), both the most used first: pale never, full {MOST_LIFT:g} times or more.",
            '<div class="side">' + "".join(f"<div>{each}</div>" for each in maps) + "</div>",
        )
    ]


def _memory(schedules: Sequence[Schedule]) -> str:
    most = max(max(schedule.device.total, schedule.host.total) for schedule in schedules)
    unit, size = ("GiB", 1 << 30) if most >= 1 << 30 else ("MiB", 1 << 20)
    bars = [(name, [part / size for part in parts]) for each in schedules for name, parts in _tiers(each)]
    return section(
        "Memory on each tier",
        "What each schedule puts where, within its budgets.",
        stacked_bars(bars, PARTS, unit),
    )


def _tiers(schedule: Schedule) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, tier in (("GPU", schedule.device), ("host", schedule.host)):
        if tier.total:
            yield f"{schedule.machine.name}, {name}", _sizes(tier)


def _sizes(tier: TierBytes) -> tuple[int, ...]:
    return (
        tier.dense_weights,
        tier.kv_cache,
        tier.activations,
        tier.slot_tables,
        tier.stream_buffers,
        tier.experts,
    )


def _speed(schedules: Sequence[Schedule]) -> str:
    times: list[Line] = []
    hits: list[Line] = []
    for schedule in schedules:
        curve, name = schedule.prediction.curve, f"{schedule.machine.name}"
        most = max(point.expert_bytes for point in curve) or 1
        share = tuple(100 * point.expert_bytes / most for point in curve)
        if name not in {line.name for line in times}:
            times.append(Line(name, share, tuple(point.milliseconds_per_token for point in curve)))
        kind = "CPU alone" if schedule.device.total == 0 else "GPU"
        if kind not in {line.name for line in hits}:
            hits.append(Line(kind, share, tuple(point.hit_rate for point in curve)))
            optimum = tuple(point.optimal_hit_rate for point in curve)
            hits.append(Line(f"{kind}, optimum", share, optimum, dashed=True))
    across = "experts in the fastest tier, % of their bytes"
    rows = [
        (
            schedule.machine.name,
            _budgets(schedule),
            f"{schedule.prediction.hit_rate:.2f} ({schedule.prediction.optimal_hit_rate:.2f})",
            f"{schedule.prediction.milliseconds_per_token:.2f}",
            f"{schedule.prediction.resident_milliseconds:.2f}",
            policy_name(schedule.policy),
        )
        for schedule in schedules
    ]
    return section(
        "Predicted speed over budgets",
        "By the cost model, from the machines' figures: decode at batch 1, all other experts in host memory (without a "
        "GPU: in the file). The table has the schedules' own budgets.",
        chart(times, across, "ms/token", logarithmic=True),
        chart(hits, across, "hit rate"),
        table(("machine", "budgets", "hits (optimum)", "ms/token", "all resident", "policy"), rows),
    )


def _prefetch(schedules: Sequence[Schedule]) -> str:
    rows = [
        (
            schedule.machine.name,
            figures.source + (" (on)" if figures.source == schedule.prefetch.source else ""),
            f"{figures.recall:.2f}",
            f"{figures.exact_match:.2f}",
            human_bytes(int(figures.fetched_bytes_per_token)),
            human_bytes(int(figures.wasted_bytes_per_token)),
            f"{figures.gain_milliseconds:+.3f}",
        )
        for schedule in schedules
        for figures in schedule.prefetch.candidates
    ]
    if not rows:
        return ""
    return section(
        "Guessing the next layer's experts",
        "Each way to guess on the traces, held out: what share of the chosen experts it names, how often all of them, "
        "and what fetching them ahead would gain by the cost model. On where that is above 0 and the runtime can.",
        table(
            ("machine", "guess", "recall", "exact", "fetched/token", "wasted/token", "gain, ms/token"), rows
        ),
    )


def _budgets(schedule: Schedule) -> str:
    budgets = schedule.budgets
    host = f"host {human_bytes(budgets.host_memory_bytes)}"
    return f"GPU {human_bytes(budgets.device_memory_bytes)}, {host}" if schedule.device.total else host
