"""Logits of a text by the kernels of prompts beside those of decoding, at a model's real size.

    python -m benchmarks.agreement dsv2.moec --device cuda:0

Tests compare tiny models with transformers; here both ways of one bundle are held against each other, where random
weights are enough. Steps of few tokens keep activations in two 16-bit parts, those of many round them to bfloat16, and
where two experts' scores are closer than that, another one is chosen. So errors are those of rounding, more where a
choice is another: a kernel that is wrong at a real size shows as errors of the size of the logits.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from benchmarks.support.common import print_rows, write_result
from benchmarks.support.references import position_errors
from moec import runtime

FEW = 8
"""Tokens of a step that decoding's kernels take."""
SEED = 1


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--tokens", type=click.IntRange(min=FEW + 1), default=200, show_default=True)
def main(bundle: Path, device: str, tokens: int) -> None:
    """Score one random text of BUNDLE in steps of few tokens and in one step."""
    found = []
    for step_tokens in (FEW, tokens + 1):
        with runtime.load(
            bundle,
            device=device,
            max_batch=1,
            max_step_tokens=step_tokens,
            cache_tokens=2 * tokens,
            verify="sizes",
        ) as model:
            text = np.random.default_rng(SEED).integers(2, model.record.vocab_size, tokens)
            found.append(model.engine.score(tuple(text.tolist())).copy())
    few, many = found
    errors = position_errors(many, few)
    row = {
        "tokens": tokens,
        "median error": float(np.median(errors)),
        "error at 99 %": float(np.quantile(errors, 0.99)),
        "likeliest alike": float((many.argmax(1) == few.argmax(1)).mean()),
    }
    print_rows([row])
    print(write_result(f"agreement-{device.partition(':')[0]}-{bundle.stem}", [row]))


if __name__ == "__main__":
    main()
