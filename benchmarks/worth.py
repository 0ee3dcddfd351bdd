"""Which of the CPU's experts get a slot, by arithmetic: hits, and the time of a layer's missing experts.

    python -m benchmarks.worth --machine examples/machines/rtx-4090-24gb.json

Made-up routing goes through the rule that the GPU has (`moec.planning.policies.divided`), one layer of a model's shape
at a time. "clock": a missing expert is fetched once in eight tokens, whatever the CPU's share, as before decision 44;
"worth": where it is ahead of who leaves for it by as many uses as the machine's speeds ask for; "link": the CPU
computes none. The profile is that of the first half of the tokens, the figures are of the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.support.common import print_rows, write_result
from moec.artifacts.files.records import read_machine
from moec.artifacts.schedule import DEFAULT_POLICY
from moec.artifacts.sharing import ShareSpeeds, cpu_shares, worth_uses
from moec.artifacts.words.slots import LEARN_TOKENS
from moec.planning import policies
from moec.planning.routing.replay import by_use, use_shares
from moec.planning.routing.synthetic import SCATTERED, SKEWED, TOPICAL, zipf_traces

if TYPE_CHECKING:
    from moec.artifacts.machine import MachineRecord
    from moec.planning.policies import Integers

TOKENS = 1200
SHARES = (0.25, 0.5, 0.75)
SHAPES = {
    "deepseek-v2-lite bf16": (64, 6, 17_301_504),
    "deepseek-v2-lite int4": (64, 6, 4_886_528),
    "qwen3-30b-a3b bf16": (128, 8, 9_437_184),
}
"""Experts, top-k, bytes of an expert."""
ROUTINGS = {"topical": TOPICAL, "skewed": SKEWED, "scattered": SCATTERED}
REPEATS_TOKENS, REPEATS_POOL = 100, 3
"""Routing that repeats itself: for so many tokens out of so many times top-k experts, then of others."""


@dataclass(frozen=True)
class Rule:
    """What a layer does with its misses."""

    cpu_share: tuple[int, ...]
    margin: int


def made_up(experts: int, top_k: int) -> dict[str, Integers]:
    """``[TOKENS, K]`` by the kind of routing."""
    random = np.random.default_rng(0)
    pools = [random.permutation(experts)[: REPEATS_POOL * top_k] for _ in range(TOKENS // REPEATS_TOKENS)]
    repeats = [random.permutation(pools[n // REPEATS_TOKENS])[:top_k] for n in range(TOKENS)]
    found = {
        name: zipf_traces([(experts, top_k)], TOKENS, routing).layers[0].chosen.astype(np.int64)
        for name, routing in ROUTINGS.items()
    }
    uniform = [random.permutation(experts)[:top_k] for _ in range(TOKENS)]
    return found | {"uniform": np.stack(uniform), "repeats": np.stack(repeats)}


def replay(chosen: Integers, experts: int, slots: int, rule: Rule) -> list[tuple[int, int]]:
    """Misses and those of the CPU, of each token of the second half."""
    known, own = np.array_split(chosen, 2)
    shares, policy = use_shares(known[None], experts), DEFAULT_POLICY
    state, resident = policies.initial_state(policy, shares[0]), np.zeros(experts, np.bool_)
    resident[by_use(shares)[0, :slots]] = True
    found = []
    for number, token in enumerate(own, 1):
        policies.count(policy, state, (token,), np.ones_like(token), 1)
        keys, ids = policies.keys(policy, state), token.tolist()
        fetched, by_cpu = policies.divided(
            keys, resident, ids, slots, rule.cpu_share, rule.margin, in_turn=number % LEARN_TOKENS == 0
        )
        there = [expert for expert in ids if resident[expert]]
        for expert, victim in policies.replacements(policy, keys, resident, there + fetched, slots):
            resident[expert] = True
            if victim is not None:
                resident[victim] = False
        found.append((len(fetched) + len(by_cpu), len(by_cpu)))
    return found


def speeds_of(machine: MachineRecord, size: int) -> ShareSpeeds:
    """What an expert costs on either way."""
    link, cpu = (
        machine.link_gb_s * machine.link_efficiency,
        machine.host_bandwidth_gb_s * machine.host_efficiency,
    )
    return ShareSpeeds(size / link / 1e3, (0.0, size / cpu / 1e3), machine.handshake_us)


@click.command()
@click.option(
    "--machine", "machines", type=click.Path(path_type=Path, exists=True), multiple=True, required=True
)
def main(machines: tuple[Path, ...]) -> None:
    """Replay made-up routing."""
    rows: list[dict[str, Any]] = []
    for shape, (experts, top_k, size) in SHAPES.items():
        traces = made_up(experts, top_k)
        for machine in map(read_machine, machines):
            speeds = speeds_of(machine, size)
            shares, memory_us = cpu_shares(speeds, top_k), size / machine.host_bandwidth_gb_s / 1e3
            margin = policies.worth_margin(DEFAULT_POLICY, worth_uses(speeds))
            rules = {"link": Rule((0,), -1), "clock": Rule(shares, -1), "worth": Rule(shares, margin)}
            for routing, chosen in traces.items():
                for share in SHARES:
                    row: dict[str, Any] = {"shape": shape, "machine": machine.name, "routing": routing}
                    row["slots"] = f"{share:.0%}"
                    for name, rule in rules.items():
                        steps = replay(chosen, experts, round(share * experts), rule)
                        times = [max(speeds.of(*step), step[0] * memory_us) for step in steps]
                        row[f"{name} hits"] = 1 - float(np.mean([misses for misses, _ in steps])) / top_k
                        row[f"{name} us"] = float(np.mean(times))
                    rows.append(row | {"gain": row["clock us"] / row["worth us"] - 1})
    print_rows(rows)
    for routing in traces:
        gains = [1 + row["gain"] for row in rows if row["routing"] == routing]
        print(f"{routing}: {np.exp(np.mean(np.log(gains))):.2f}, {min(gains):.2f} to {max(gains):.2f}")
    print(write_result("worth", rows))


if __name__ == "__main__":
    main()
