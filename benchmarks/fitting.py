"""``--fit`` beside every uniform format: held-out loss at equal bytes, on a checkpoint in transformers.

    python -m benchmarks.fitting examples/tiny-deepseek-v2

Prints a table and writes ``benchmarks/results/fitting.json``. A target is the name of a uniform format and its scope,
whose own size is then the limit, or a size such as ``18MiB`` of everything resident. Formats are chosen from the
calibration prompts (``--calibration``: others), never from the held-out text that loss is measured on; weights are
rounded in transformers' own modules as bundles have them (see ``tests/end_to_end/test_quantized.py``).
*all*: the format for every weight that can have one; *recipe*: 8 bits for what is no routed expert. Every fit is also
rounded with feedback, from the same calibration prompts. ``--keep`` takes over what the results that are there say of
the same formats on the same text.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quantization_accuracy import held_out_windows
from benchmarks.support.common import known_rows, write_result
from benchmarks.support.rounded_checkpoint import RoundedCheckpoint
from moec.artifacts.accuracy import Agreement
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.quantization import PLAIN
from moec.artifacts.schedule import Budgets
from moec.cli.output import StageLog
from moec.compiler.calibration.rounding import feedback_rounding
from moec.compiler.checkpoint import fetch_weights, open_checkpoint
from moec.compiler.choices import choose_context, choose_dtype
from moec.compiler.fitting.fit import choose_options, measure
from moec.compiler.fitting.units import fit_units, option_of, with_losses
from moec.compiler.generation import generation_defaults
from moec.compiler.partition import partition
from moec.compiler.profiling.calibration import read_prompts
from moec.compiler.quantization.policies import BYTE_FORMAT, METHOD
from moec.compiler.request import Calibration, FitRequest
from moec.compiler.trace import trace
from moec.formats import FORMATS
from moec.planning.fitting.fit import resident_bytes, with_options
from moec.planning.fitting.losses import predicted_losses
from moec.planning.fitting.units import FitUnit
from moec.planning.machines import CONTEXT_TOKENS, STEP_TOKENS
from moec.runtime.memory.budget import parse_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from moec.compiler.fitting.units import Unit
    from moec.compiler.partition import PartitionedModel

FEEDBACK = "feedback"
TARGETS = ("17MiB", "17.5MiB", "18MiB", "18.5MiB", "19MiB", "19.5MiB", "20.5MiB")
FIGURES = ("mean_kl", "perplexity")
NAME = "fitting"


def uniform(units: Sequence[Unit], name: str, scope: str) -> dict[str, str]:
    """One format for all units, or for the experts beside 8 bits."""
    eight = BYTE_FORMAT if name != PLAIN and FORMATS[name].bits == 4 else name
    return {unit.name: name if scope == "all" or unit.layer is not None else eight for unit in units}


def uniforms(wanted: str) -> Iterator[tuple[str, str]]:
    """Names and scopes; of 8 bits and more both scopes are the same."""
    for name in (PLAIN, *FORMATS):
        for scope in ("all", "recipe") if name != PLAIN and FORMATS[name].bits == 4 else ("all",):
            if re.search(wanted, f"{name}, {scope}"):
                yield name, scope


def build_parts(path: Path) -> tuple[Any, PartitionedModel]:
    """The checkpoint, and its chain."""
    checkpoint = fetch_weights(open_checkpoint(path))
    config = checkpoint.config
    traced = trace(config, dtype=choose_dtype(config, None), max_context=choose_context(config, None))
    generation = generation_defaults(config, checkpoint.generation_config)
    return checkpoint, partition(traced, generation=generation, config_sha256=checkpoint.config_sha256)


class Sizes:
    """Bytes of everything resident, by the formats of units."""

    def __init__(self, parts: PartitionedModel, units: Sequence[Unit]) -> None:
        self._parts, self._units, self._facts = parts, units, footprint(parts.model)
        self._budgets = Budgets(0, 0, min(parts.model.max_context, CONTEXT_TOKENS), STEP_TOKENS)

    def of(self, formats: Mapping[str, str]) -> int:
        """With so many tokens of context and in a step as ``--fit`` counts."""
        pairs = [
            FitUnit(
                unit.name,
                tuple(option_of(self._parts, unit, kind) for kind in (PLAIN, formats[unit.name])),
            )
            for unit in self._units
        ]
        found = with_options(self._facts, pairs, [1] * len(pairs))
        return resident_bytes(found, self._budgets, on_device=False)


class Results:
    """Rows of the table, written after each one.

    Args:
        judge: measures them.
        facts: about the run, beside the rows in the file.
        known: rows that need not be measured again.
    """

    def __init__(
        self, judge: RoundedCheckpoint, facts: Mapping[str, Any], known: Sequence[Mapping[str, Any]]
    ) -> None:
        self._judge, self._facts, self._known = judge, facts, known
        self.rows: list[Mapping[str, Any]] = []

    def add(self, name: str, units: Sequence[Unit], formats: Mapping[str, str], **facts: Any) -> None:
        """``facts`` are its bytes, its method, and what else there is to say."""
        method = facts["method"]
        same = [row for row in self._known if (row["formats"], row["method"]) == (formats, method)]
        agreement = Agreement(**same[0]["held_out"]) if same else self._judge.loss(formats, units, method)
        self.rows.append({"name": name, **facts, "held_out": asdict(agreement), "formats": formats})
        change = agreement.perplexity / agreement.reference_perplexity - 1
        print(f"{name:30} {facts['bytes']:10} {change:+9.3%} {agreement.mean_kl:9.3e}", flush=True)
        names = {row["name"] for row in self.rows}
        others = [row for row in self._known if row["name"] not in names and "limit_bytes" not in row]
        write_result(NAME, [*self.rows, *others], **self._facts)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, help="a file of text that the model was not trained on")
    parser.add_argument("--windows", type=int, help="at most so many, evenly spread (default: all)")
    parser.add_argument(
        "--calibration", type=Path, help="prompts to measure with (default: the shipped ones)"
    )
    parser.add_argument("--only", default="", help="uniform formats in whose names this expression is found")
    parser.add_argument("--targets", nargs="*", default=TARGETS)
    parser.add_argument("--keep", action="store_true", help="take over what is known of the same formats")
    return parser.parse_args()


def main() -> None:
    """Measure, choose, round, compare, print, write."""
    options = parse_options()
    windows = held_out_windows(options.checkpoint, options.text, options.windows)
    tokens = sum(map(len, windows))
    checkpoint, parts = build_parts(options.checkpoint)
    prompts = None if options.calibration is None else read_prompts(options.calibration)
    calibration, log = Calibration(prompts=prompts), StageLog()
    units = fit_units(parts, {})
    sizes = Sizes(parts, units)
    found = measure(parts, checkpoint, units, calibration, log)
    fitted = [with_losses(parts, unit, found.losses[unit.name], found.swaps[unit.name]) for unit in units]
    facts = {"checkpoint": options.checkpoint.name, "windows": len(windows), "tokens": tokens}
    with feedback_rounding(parts, checkpoint, calibration, log) as calibrated:
        judge = RoundedCheckpoint(checkpoint, parts, windows, calibrated)
        known = known_rows(NAME, **facts) if options.keep else []
        results = Results(judge, {**facts, "calibration_tokens": found.tokens}, known)
        print(f"{'formats':30} {'bytes':>10} {'perplexity':>9} {'mean KL':>9}")
        for name, scope in uniforms(options.only):
            formats = uniform(units, name, scope)
            results.add(f"{name}, {scope}", units, formats, bytes=sizes.of(formats), method=METHOD)
        for target in options.targets:
            name, _, scope = target.partition(",")
            named = name == PLAIN or name in FORMATS
            limit = sizes.of(uniform(units, name, scope)) if named else parse_memory(target, 0, "target")
            request = FitRequest(target, limit_bytes=limit)
            chosen = choose_options(parts.model, fitted, request, found, on_device=False).chosen
            options_of = zip(fitted, chosen, strict=True)
            formats = {unit.name: unit.options[number].format for unit, number in options_of}
            more = {"limit_bytes": limit, "predicted": sum(predicted_losses(fitted, chosen))}
            for method, suffix in ((METHOD, ""), (FEEDBACK, f", {FEEDBACK}")):
                own = {"bytes": sizes.of(formats), "method": method, **more}
                results.add(f"fit {target}{suffix}", units, formats, **own)
    summarise(results.rows)


def summarise(rows: Sequence[Mapping[str, Any]]) -> None:
    """Each fit beside the best uniform format that meets its target."""
    for row in rows:
        if "limit_bytes" not in row:
            continue
        others = [each for each in rows if "limit_bytes" not in each and each["bytes"] <= row["limit_bytes"]]
        for figure in FIGURES if others else ():
            best = min(others, key=lambda each: each["held_out"][figure])
            own, least = row["held_out"][figure], best["held_out"][figure]
            print(f"{row['name']}: {figure} {own:.6g}, best uniform {least:.6g} ({best['name']})")


if __name__ == "__main__":
    main()
