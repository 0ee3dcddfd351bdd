"""What each format costs in accuracy, on a checkpoint in transformers with its weights rounded to the format.

    python -m benchmarks.quantization_accuracy examples/tiny-deepseek-v2 --windows 32

Prints a table and writes ``benchmarks/results/quantization_accuracy.json``: perplexity, and the divergence from the
unquantized model, teacher-forced over windows of held-out text. That a bundle computes what its dequantized weights
say is what ``tests/end_to_end/test_quantized.py`` is for; so this needs no compiler, and takes any method.

With ``--method feedback`` routed experts are rounded by what enters them: on the shipped calibration prompts, or with
``--calibration-tokens`` on so many of the training chapters. ``--keep`` lets rows be measured a few at a time.

The text is that of ``examples/train_tiny_deepseek_v2/`` (the program ``bible`` has to be there), the chapters that
training never saw; ``--text`` names another. llama.cpp's Q4_0 (``q4_0.py``) on the same weights is beside our formats,
with and without rounding activations as its products do.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.support.calibrated_experts import ExpertInputs, expert_inputs, round_experts
from benchmarks.support.common import known_rows, write_result
from benchmarks.support.q4_0 import q4_0, q8_0
from moec.artifacts.model import ExpertBody
from moec.compiler.profiling.calibration import DEFAULT_PROMPTS, read_prompts
from moec.compiler.reference import compare
from moec.formats import CALIBRATED, FORMATS, METHODS, dequantize
from moec.formats.feedback import takes_feedback

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

WINDOW = 512
"""The longest context that the trained example was trained on."""
BYTES = "int8-g128"
"""Of what is not a routed expert, in the column ``recipe``."""
BEGIN = "<|begin|>"

Rounding = Callable[["NDArray[np.float32]"], "NDArray[np.float32]"]
"""Takes rows ``[N, K]``, gives what is left of them."""


@dataclass(frozen=True)
class Scheme:
    """How weights are rounded."""

    name: str
    experts: Rounding | None
    others: Rounding | None = None
    """Of the other matrices, the embedding and the head."""
    rounds_activations: bool = False
    """To Q8_0, where they meet a rounded weight."""


def schemes(method: str) -> Iterator[Scheme]:
    """Every format on the routed experts alone, and with 8 bits for all other matrices; llama.cpp's Q4_0 beside."""
    yield Scheme("bfloat16", None)
    for name in FORMATS:
        yield Scheme(f"{name}, experts", _nearest(name, method))
    yield Scheme("Q4_0, experts", q4_0)
    yield Scheme("Q4_0 x Q8_0, experts", q4_0, None, rounds_activations=True)
    for name, kind in FORMATS.items():
        yield Scheme(
            f"{name}, recipe", _nearest(name, method), _nearest(name if kind.bits == 8 else BYTES, method)
        )
    for name in ("int8-g128", "int4-g32", "mxfp4"):
        yield Scheme(f"{name}, all", _nearest(name, method), _nearest(name, method))
    yield Scheme("Q4_0, all", q4_0, q4_0)
    yield Scheme("Q4_0 x Q8_0, all", q4_0, q4_0, rounds_activations=True)


def _nearest(name: str, method: str) -> Rounding:
    kind = FORMATS[name]
    return lambda rows: dequantize(kind, METHODS[method](kind, rows))


def round_weights(
    model: torch.nn.Module,
    original: dict[str, torch.Tensor],
    scheme: Scheme,
    inputs: dict[str, ExpertInputs],
) -> set[int]:
    """Put the rounded weights in; gives the storages of those that were. ``inputs`` are of methods that want such."""
    rounded = set()
    for name, parameter in model.named_parameters():
        rounding = scheme.experts if parameter.ndim == 3 else scheme.others
        parameter.data.copy_(original[name])
        if rounding is None or parameter.ndim < 2 or name.endswith(".gate.weight"):
            continue
        rows = original[name].reshape(-1, parameter.shape[-1]).numpy()
        parameter.data.copy_(torch.from_numpy(rounding(rows)).reshape(parameter.shape))
        rounded.add(parameter.untyped_storage().data_ptr())
    kind = FORMATS.get(scheme.name.split(",")[0])
    if kind is not None and takes_feedback(kind):
        parameters = dict(model.named_parameters())
        for name, entered in inputs.items():
            both, down = f"{name}.gate_up_proj", f"{name}.down_proj"
            found = round_experts(original[both], original[down], entered, body_of(model), kind)
            parameters[both].data.copy_(found[0])
            parameters[down].data.copy_(found[1])
    return rounded


def body_of(model: torch.nn.Module) -> ExpertBody:
    """The trained example's experts."""
    config: Any = model.config
    return ExpertBody(
        name="experts",
        hidden=config.hidden_size,
        intermediate=config.moe_intermediate_size,
        activation=("mul", ("silu", "gate"), "up"),
        gated=True,
        up_bias=False,
        down_bias=False,
        dtype="float32",
        format=None,
    )


class RoundedActivations(TorchFunctionMode):
    """Products with rounded weights take their other side in Q8_0."""

    def __init__(self, storages: set[int]) -> None:
        super().__init__()
        self.storages = storages

    def __torch_function__(
        self, function: Any, _types: Any, arguments: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Round before ``linear``."""
        is_linear = function is torch.nn.functional.linear
        if is_linear and arguments[1].untyped_storage().data_ptr() in self.storages:
            x = torch.from_numpy(q8_0(arguments[0].contiguous().numpy()))
            arguments = (x, *arguments[1:])
        return function(*arguments, **(named or {}))


def held_out_windows(checkpoint: Path, text: Path | None, most: int | None) -> list[list[int]]:
    """Token ids of windows that do not overlap; at most so many, evenly spread."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if text is not None:
        passages = [text.read_text(encoding="utf-8")]
    else:
        from examples.train_tiny_deepseek_v2.text import read_text, to_chapters

        passages = [BEGIN + chapter.text for chapter in to_chapters(read_text(None)) if chapter.held_out]
    windows: list[list[int]] = []
    for passage in passages:
        ids = tokenizer(passage, add_special_tokens=False)["input_ids"]
        windows += [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    if most and most < len(windows):
        windows = [windows[at * len(windows) // most] for at in range(most)]
    return windows


def calibration_windows(checkpoint: Path, tokens: int | None) -> list[list[int]]:
    """Token ids of the shipped prompts, or of chapters that training saw, in random order."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if tokens is None:
        texts = [prompt.text or "" for prompt in read_prompts(DEFAULT_PROMPTS)]
    else:
        from examples.train_tiny_deepseek_v2.text import read_text, to_chapters

        texts = [BEGIN + chapter.text for chapter in to_chapters(read_text(None)) if not chapter.held_out]
        random.Random(0).shuffle(texts)
    windows: list[list[int]] = []
    for text in texts:
        windows.append(tokenizer(text, add_special_tokens=False)["input_ids"][:WINDOW])
        if tokens is not None and sum(map(len, windows)) >= tokens:
            break
    return windows


def main() -> None:
    """Round, run, compare, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, help="a file of text that the model was not trained on")
    parser.add_argument("--windows", type=int, help="at most so many, evenly spread (default: all)")
    parser.add_argument("--method", choices=sorted(METHODS), default="nearest")
    parser.add_argument(
        "--calibration-tokens", type=int, help="of training chapters (default: the shipped prompts)"
    )
    parser.add_argument("--only", default="", help="schemes in whose names this expression is found")
    parser.add_argument(
        "--keep", action="store_true", help="keep rows of the results that are there, if of the same text"
    )
    options = parser.parse_args()
    windows = held_out_windows(options.checkpoint, options.text, options.windows)
    model = AutoModelForCausalLM.from_pretrained(
        options.checkpoint,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def logits() -> Iterator[NDArray[np.float32]]:
        with torch.inference_mode():
            for window in windows:
                yield model(torch.tensor([window])).logits[0].numpy()

    expected = list(logits())
    inputs: dict[str, ExpertInputs] = {}
    if options.method in CALIBRATED:
        calibration = calibration_windows(options.checkpoint, options.calibration_tokens)
        inputs = expert_inputs(model, calibration)
        print(f"{sum(map(len, calibration))} calibration tokens")
    rows = []
    print(f"{'scheme':26} {'perplexity':>10} {'change':>9} {'mean KL':>9} {'99 % KL':>9} {'same':>8}")
    for scheme in schemes(options.method):
        if not re.search(options.only, scheme.name):
            continue
        storages = round_weights(model, original, scheme, inputs)
        with RoundedActivations(storages) if scheme.rounds_activations else contextlib.nullcontext():
            found = compare(windows, iter(expected), logits())
        change = found.perplexity / found.reference_perplexity - 1
        print(
            f"{scheme.name:26} {found.perplexity:10.4f} {change:+9.3%} {found.mean_kl:9.2e} {found.kl_99:9.2e} "
            f"{found.argmax_agreement:8.2%}",
            flush=True,
        )
        rows.append({"scheme": scheme.name, **asdict(found)})
    name = (
        "quantization_accuracy" if options.method == "nearest" else f"quantization_accuracy_{options.method}"
    )
    facts = {
        "checkpoint": options.checkpoint.name,
        "method": options.method,
        "calibration_tokens": sum(len(each.x) for each in list(inputs.values())[:1]),
        "windows": len(windows),
        "tokens": sum(map(len, windows)),
    }
    measured = {row["scheme"] for row in rows}
    known = known_rows(name, **facts) if options.keep else []
    order = [scheme.name for scheme in schemes(options.method)]
    rows += [row for row in known if row["scheme"] not in measured]
    write_result(name, sorted(rows, key=lambda row: order.index(row["scheme"])), **facts)


if __name__ == "__main__":
    main()
