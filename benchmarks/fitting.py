"""``--fit`` beside every uniform format: held-out loss at equal bytes, on a checkpoint in transformers.

    python -m benchmarks.fitting examples/tiny-deepseek-v2 --windows 16

Prints a table and writes ``benchmarks/results/fitting.json``. A target is the name of a uniform format and its scope,
whose own size is then the limit, or a size such as ``18MiB`` of everything resident. Formats are chosen from the
calibration prompts (``--calibration``: others), never from the held-out text that loss is measured on; weights are
rounded in transformers' own modules as bundles have them (see ``tests/end_to_end/test_quantized.py``).
*all*: the format for every weight that can have one; *recipe*: 8 bits for what is no routed expert.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import write_result
from benchmarks.quantization_accuracy import held_out_windows
from moec.artifacts.footprint import footprint
from moec.artifacts.quantization import PLAIN
from moec.artifacts.schedule import Budgets
from moec.cli.output import StageLog
from moec.compiler.checkpoint import fetch_weights, open_checkpoint
from moec.compiler.choices import choose_context, choose_dtype
from moec.compiler.fitting.fit import choose_options, measure
from moec.compiler.fitting.units import fit_units, option_of, with_losses
from moec.compiler.generation import generation_defaults
from moec.compiler.partition import partition
from moec.compiler.profiling.calibration import read_prompts
from moec.compiler.quantization.policies import BYTE_FORMAT, METHOD
from moec.compiler.reference import compare
from moec.compiler.request import Calibration, FitRequest
from moec.compiler.trace import trace
from moec.formats import FORMATS, METHODS, dequantize
from moec.planning.fitting import FitUnit, resident_bytes, with_options
from moec.planning.machines import CONTEXT_TOKENS, STEP_TOKENS
from moec.runtime.memory.budget import parse_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from moec.artifacts.accuracy import Agreement
    from moec.compiler.fitting.units import Unit
    from moec.compiler.partition import PartitionedModel


class Judge:
    """Held-out loss of a checkpoint whose units are rounded to some formats."""

    def __init__(self, checkpoint: Path, parts: PartitionedModel, windows: Sequence[list[int]]) -> None:
        self._windows = windows
        self._model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        self._own = {name: tensor.detach().clone() for name, tensor in self._model.named_parameters()}
        self._sources = {source.layer: source for source in parts.packing.experts}
        self._expected = list(self._logits())

    def loss(self, formats: Mapping[str, str], units: Sequence[Unit]) -> Agreement:
        """Against the model as it is; ``formats`` are by the unit's name."""
        for name, parameter in self._model.named_parameters():
            parameter.data.copy_(self._own[name])
        parameters = dict(self._model.named_parameters())
        for unit in units:
            kind = formats[unit.name]
            names = unit.parameters
            if unit.layer is not None:
                names = (self._sources[unit.layer].up, self._sources[unit.layer].down)
            for name in names if kind != PLAIN else ():
                values = self._own[name]
                rows = values.reshape(-1, values.shape[-1]).numpy()
                rounded = dequantize(FORMATS[kind], METHODS[METHOD](FORMATS[kind], rows))
                parameters[name].data.copy_(torch.from_numpy(rounded).reshape(values.shape))
        return compare(self._windows, iter(self._expected), self._logits())

    def _logits(self) -> Iterator[NDArray[np.float32]]:
        with torch.inference_mode():
            for window in self._windows:
                yield self._model(torch.tensor([window])).logits[0].numpy()


def uniform(units: Sequence[Unit], name: str, scope: str) -> dict[str, str]:
    """One format for all units, or for the experts beside 8 bits."""
    eight = name if FORMATS[name].bits == 8 else BYTE_FORMAT
    return {unit.name: name if scope == "all" or unit.layer is not None else eight for unit in units}


def build_parts(path: Path) -> tuple[Any, PartitionedModel]:
    """The checkpoint, and its chain."""
    checkpoint = fetch_weights(open_checkpoint(path))
    config = checkpoint.config
    traced = trace(config, dtype=choose_dtype(config, None), max_context=choose_context(config, None))
    generation = generation_defaults(config, checkpoint.generation_config)
    return checkpoint, partition(traced, generation=generation, config_sha256=checkpoint.config_sha256)


def main() -> None:
    """Measure, choose, round, compare, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, help="a file of text that the model was not trained on")
    parser.add_argument("--windows", type=int, default=16, help="of held-out text, evenly spread")
    parser.add_argument(
        "--calibration", type=Path, help="prompts to measure with (default: the shipped ones)"
    )
    parser.add_argument("--only", default="", help="uniform formats in whose names this expression is found")
    parser.add_argument("--targets", nargs="+", default=["17MiB", "18.5MiB", "20.5MiB"])
    options = parser.parse_args()
    windows = held_out_windows(options.checkpoint, options.text)
    windows = [windows[at * len(windows) // options.windows] for at in range(options.windows)]
    checkpoint, parts = build_parts(options.checkpoint)
    facts = footprint(parts.model)
    budgets = Budgets(0, 0, min(parts.model.max_context, CONTEXT_TOKENS), STEP_TOKENS)
    prompts = None if options.calibration is None else read_prompts(options.calibration)
    units = fit_units(parts, {})
    found = measure(parts, checkpoint, units, Calibration(prompts=prompts), StageLog())
    judge = Judge(options.checkpoint, parts, windows)

    def size(formats: Mapping[str, str]) -> int:
        pairs = [
            FitUnit(
                unit.name, tuple(option_of(parts, unit, kind, 0.0) for kind in (PLAIN, formats[unit.name]))
            )
            for unit in units
        ]
        return resident_bytes(with_options(facts, pairs, [1] * len(units)), budgets, on_device=False)

    rows: list[dict[str, Any]] = []

    def judged(name: str, formats: Mapping[str, str], **more: Any) -> None:
        agreement = judge.loss(formats, units)
        rows.append({"name": name, "bytes": size(formats), **more, **asdict(agreement), "formats": formats})
        change = agreement.perplexity / agreement.reference_perplexity - 1
        print(f"{name:24} {size(formats):10} {change:+9.3%} {agreement.mean_kl:9.3e}", flush=True)

    print(f"{'formats':24} {'bytes':>10} {'perplexity':>9} {'mean KL':>9}")
    for name in FORMATS:
        for scope in ("all", "recipe"):
            wanted = re.search(options.only, f"{name}, {scope}")
            if wanted and (scope == "all" or FORMATS[name].bits == 4):
                judged(f"{name}, {scope}", uniform(units, name, scope))
    fitted = [with_losses(parts, unit, found.losses[unit.name]) for unit in units]
    for target in options.targets:
        name, _, scope = target.partition(",")
        limit = size(uniform(units, name, scope)) if name in FORMATS else parse_memory(target, 0, "target")
        request = FitRequest(target, limit_bytes=limit)
        chosen = choose_options(parts.model, fitted, request, found, on_device=False)
        picked = {
            unit.name: unit.options[number].format for unit, number in zip(fitted, chosen.chosen, strict=True)
        }
        judged(f"fit {target}", picked, limit_bytes=limit, predicted=chosen_loss(fitted, chosen.chosen))
    summarise(rows)
    write_result(
        "fitting",
        rows,
        checkpoint=options.checkpoint.name,
        windows=len(windows),
        tokens=sum(map(len, windows)),
        calibration_tokens=found.tokens,
    )


def chosen_loss(units: Sequence[FitUnit], chosen: Sequence[int]) -> float:
    """As predicted, of all units together."""
    return sum(unit.options[number].loss for unit, number in zip(units, chosen, strict=True))


def summarise(rows: Sequence[Mapping[str, Any]]) -> None:
    """Each fit beside the best uniform format that meets its target."""
    for row in rows:
        if "limit_bytes" not in row:
            continue
        others = [each for each in rows if "limit_bytes" not in each and each["bytes"] <= row["limit_bytes"]]
        if not others:
            continue
        for figure in ("mean_kl", "perplexity"):
            best = min(others, key=lambda each: each[figure])
            print(
                f"{row['name']}: {figure} {row[figure]:.6g}, best uniform {best[figure]:.6g} ({best['name']})"
            )


if __name__ == "__main__":
    main()
