"""``moec verify``: is a bundle whole, and does it compute what the checkpoint computes?"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.cli.options import bundle_argument, json_option, threads_option
from moec.cli.output import ProgressBar, print_json
from moec.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from moec.artifacts.accuracy import Comparison
    from moec.artifacts.model import DType
    from moec.runtime import Model

SEQUENCE_TOKENS = 128
MINIMUM_TOKENS = 2
COMPARING = ("tokens", "text", "reference_dtype", "record", "cpu_threads")
"""Parameters that only a comparison uses."""


@click.command("verify", short_help="Check a bundle's bytes, and its logits against transformers'.")
@bundle_argument
@click.option("--reference", metavar="MODEL", help="The checkpoint: compare logits with transformers' on it.")
@click.option(
    "--tokens",
    type=click.IntRange(min=MINIMUM_TOKENS),
    default=512,
    show_default=True,
    help="Tokens to compare, teacher-forced.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Text to compare on.  [default: shipped prompts]",
)
@click.option(
    "--reference-dtype",
    type=click.Choice(["float32", "bundle"]),
    default="float32",
    show_default=True,
    help="What transformers loads and computes in; bundle: the dtype that the bundle stores weights in.",
)
@click.option(
    "--record/--no-record", default=True, show_default=True, help="Write what was measured into the bundle."
)
@threads_option
@json_option
def command(
    bundle: Path,
    reference: str | None,
    tokens: int,
    text: Path | None,
    reference_dtype: str,
    record: bool,
    cpu_threads: int | None,
    as_json: bool,
) -> None:
    """Read every byte of BUNDLE and hold it against the manifest; with --reference, compare its logits too.

    What a comparison finds stays in the bundle, and `moec inspect` shows it.

    \b
    Example:
      moec verify tiny.moec --reference examples/tiny-deepseek-v2
    """
    from moec.artifacts.accuracy import add_comparison
    from moec.artifacts.files.codec import to_json
    from moec.artifacts.files.reader import open_bundle

    _check_options(reference)
    passage = None if text is None else _read_text(text)
    bar = ProgressBar("verify")
    bar.start(
        sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) if bundle.is_dir() else 0
    )
    opened = open_bundle(bundle, verify="full", progress=bar.advance)
    bar.close()
    facts: dict[str, Any] = {"path": str(bundle), "intact": True, "files": len(opened.manifest.files) + 1}
    comparison = None
    if reference is not None:
        comparison = compare_logits(bundle, reference, tokens, passage, reference_dtype, cpu_threads)
        facts |= {"reference_dtype": comparison.reference_dtype, **to_json(comparison.agreement)}
    if as_json:
        print_json(facts)
    else:
        click.echo(f"{bundle}: intact, {facts['files']} files")
        for line in [] if comparison is None else describe(comparison):
            click.echo(line)
    if comparison is not None and record:
        add_comparison(opened, comparison)


def describe(comparison: Comparison) -> list[str]:
    """What a person reads of it."""
    found = comparison.agreement
    return [
        (
            f"against {comparison.reference} in {comparison.reference_dtype}, {comparison.target}, "
            f"{comparison.text}, {found.tokens} tokens teacher-forced:"
        ),
        f"argmax agreement {found.argmax_agreement:.2%}",
        (
            f"KL divergence    {found.mean_kl:.2e} nats on average, {found.kl_99:.2e} at the 99th percentile, "
            f"{found.max_kl:.2e} at most"
        ),
        f"perplexity       {found.perplexity:.4f}, reference {found.reference_perplexity:.4f}",
    ]


def compare_logits(
    bundle: Path,
    reference: str,
    tokens: int,
    text: str | None,
    reference_dtype: str,
    cpu_threads: int | None,
) -> Comparison:
    """Run both models over the same tokens."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    from moec import runtime
    from moec.artifacts.accuracy import Comparison
    from moec.compiler.bundling import fingerprint
    from moec.compiler.checkpoint import fetch_weights, open_checkpoint
    from moec.compiler.reference import check_same_model, checkpoint_logits, compare

    checkpoint = open_checkpoint(reference)
    with runtime.load(bundle, verify="sizes", cpu_threads=cpu_threads) as model:
        if model.has_encoder:
            raise RequestError(
                "An encoder-decoder model cannot be compared with a reference here.",
                "Its tokens depend on a source, which a text alone does not have.",
                "Leave --reference out: the files are verified all the same.",
            )
        check_same_model(checkpoint, model.record)
        checkpoint = fetch_weights(checkpoint)
        sequences, source = choose_sequences(model, tokens, text)
        compute: DType = model.record.dtype if reference_dtype == "bundle" else "float32"
        expected = checkpoint_logits(checkpoint, sequences, compute)
        agreement = compare(sequences, expected, _measured(model, sequences))
        return Comparison(checkpoint.name, fingerprint(checkpoint), compute, model.target, source, agreement)


def choose_sequences(model: Model, tokens: int, text: str | None) -> tuple[list[list[int]], str]:
    """Sequences with ``tokens`` token ids together, from a text, the shipped prompts, or at random; and from which.

    Raises:
        BundleError: there is a text, but the bundle has no tokenizer for it.
        RequestError: the text has no token.
    """
    from moec.artifacts.random_tokens import random_tokens
    from moec.compiler.profiling.calibration import DEFAULT_PROMPTS, read_prompts

    length = min(SEQUENCE_TOKENS, model.record.max_context)
    if text is not None:
        ids, source = model.encode(text), f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    elif not model.has_tokenizer:
        draw = random.Random(0)  # noqa: S311 - reproducible test data, not a secret
        ids = random_tokens(model.record, tokens, draw)
        source = "random tokens"
    else:
        ids = [token for prompt in read_prompts(DEFAULT_PROMPTS) for token in model.encode(prompt.text or "")]
        source = "shipped prompts"
    ids = ids[:tokens]
    if len(ids) < MINIMUM_TOKENS:
        raise RequestError(
            "There is nothing to compare.", f"The text has {len(ids)} tokens.", "Give a longer --text."
        )
    return [ids[start : start + length] for start in range(0, len(ids), length)], source


def _check_options(reference: str | None) -> None:
    """Refuse the options that say how to compare where there is nothing to compare with."""
    if reference is not None:
        return
    context = click.get_current_context()
    for name in COMPARING:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --reference")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read.", f"{error}.", "Give a file of UTF-8 text.") from error


def _measured(model: Model, sequences: list[list[int]]) -> Iterator[np.ndarray[Any, Any]]:
    for ids in sequences:
        yield model.forward(ids)[0]
