"""Everything a machine with a GPU needs and cannot make: bundles compiled here, and what transformers computes.

    python -m benchmarks.prepare_carry                    # tiny bundles and references, and real models' modules
    python -m benchmarks.prepare_carry --no-real mixtral  # one tiny model only

Fills ``.carry/``: ``tiny/<name>.moec`` with ``tiny/<name>.npz``, and ``modules/<config>`` (no weights). What is
there already is kept, unless --force is given.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch

from benchmarks.make_checkpoint import CONFIGS
from benchmarks.support.common import print_rows
from benchmarks.support.quantized_carry import KEPT, RECIPES, checkpoint_of, reference_of
from benchmarks.support.references import NEW_TOKENS, PROMPT_TOKENS, computed_reference, make_reference
from moec.__main__ import run
from tests.support.encoder_decoder_judge import Judge
from tests.support.references import REFERENCES
from tests.support.references.model import greedy, rounded_activations
from tests.support.tiny_models import TINY, config_of, save
from tests.support.tiny_models.encoder_decoders import ENCODER_DECODERS
from tests.support.tiny_models.foreign import REMADE
from tests.support.tiny_models.own import OWN
from tests.support.tiny_models.sparse_attention import SELECTING

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from benchmarks.support.references import Reference

ROOT = Path(__file__).parents[1]
CARRY = ROOT / ".carry"
EXAMPLE = ROOT / "examples" / "tiny-deepseek-v2"
EXAMPLE_NAME = "example"
QUANTIZED = (*RECIPES, *KEPT)
NAMES = (*TINY, *REMADE, *SELECTING, *OWN, *ENCODER_DECODERS, *QUANTIZED, EXAMPLE_NAME)
REAL = ("deepseek-v2-lite", "qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b")
SEQUENCES, TOKENS = 4, 128
SOURCE_TOKENS = 70
LIMIT_BYTES = 50 << 20
TARGETS = ("cuda-sm_90", "cpu-x86-64-v3")
"""The CPU's, since it computes a share of the missing experts, and judges segments."""


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--target", "targets", multiple=True, default=TARGETS, show_default=True)
@click.option("--real/--no-real", default=True, help="Real configs' modules, for the same targets.")
@click.option("--force", is_flag=True, help="Make again what is there.")
def main(names: tuple[str, ...], targets: tuple[str, ...], real: bool, force: bool) -> None:
    """Prepare the tiny models NAMES (all of them by default)."""
    jobs = [(name, prepare_tiny) for name in names or NAMES]
    jobs += [(name, prepare_modules) for name in REAL] if real else []
    print_rows([_timed(name, partial(prepare, name, targets, force=force)) for name, prepare in jobs])
    size = folder_bytes(CARRY)
    print(f"{CARRY}: {size / 2**20:.1f} MiB")
    if size > LIMIT_BYTES:
        raise click.ClickException(f"More than {LIMIT_BYTES >> 20} MiB: leave some out.")


def prepare_tiny(name: str, targets: tuple[str, ...], *, force: bool = False) -> Path:
    """``.carry/tiny/<name>.moec`` and the reference beside it."""
    bundle, reference = CARRY / "tiny" / f"{name}.moec", CARRY / "tiny" / f"{name}.npz"
    has_bundle, has_reference = (path.exists() and not force for path in (bundle, reference))
    if has_bundle and has_reference:
        return bundle
    bundle.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, options = EXAMPLE, list[str]()
        if name in QUANTIZED:
            checkpoint, options = checkpoint_of(name, Path(folder))
        elif name != EXAMPLE_NAME:
            checkpoint = save(name, Path(folder, name), dtype=torch.bfloat16)
        if not has_bundle:
            compile_for(checkpoint, bundle, targets, ["--calibration", "none", "--dtype", "bf16", *options])
        if not has_reference:
            sequences = example_sequences() if name == EXAMPLE_NAME else random_sequences(name)
            made = own_reference(name, checkpoint, sequences) if name in OWN else None
            if name in QUANTIZED:
                made = reference_of(name, checkpoint, bundle, sequences)
            if name in ENCODER_DECODERS:
                made = make_encoder_decoder_reference(name, checkpoint, sequences)
            (made or make_reference(checkpoint, sequences, "bfloat16")).save(reference)
    return bundle


def prepare_modules(name: str, targets: tuple[str, ...], *, force: bool = False) -> Path:
    """``.carry/modules/<name>``: compiled from the config alone; the CPU's are the judges of segments."""
    output = CARRY / "modules" / name
    if output.is_dir() and not force:
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, name)
        checkpoint.mkdir()
        shutil.copyfile(CONFIGS[name], checkpoint / "config.json")
        compile_for(checkpoint, output, targets, ["--modules-only", "--dtype", "bf16"])
    return output


def compile_for(checkpoint: Path, output: Path, targets: tuple[str, ...], options: list[str]) -> None:
    """``moec compile`` in this process."""
    named = [option for target in targets for option in ("--target", target)]
    code = run(["compile", str(checkpoint), "-o", str(output), "--force", *named, *options])
    if code:
        raise click.ClickException(f"moec compile {checkpoint} failed with exit code {code}.")


def random_sequences(name: str) -> NDArray[np.int64]:
    """``[S, L]`` of a tiny model."""
    model = name.partition("-")[0] if name in QUANTIZED else name
    vocab_size = (
        OWN[model][0]["vocab_size"] if model in OWN else config_of(model).get_text_config().vocab_size
    )
    return np.random.default_rng(1).integers(2, vocab_size, (SEQUENCES, TOKENS))


def own_reference(name: str, checkpoint: Path, sequences: NDArray[np.int64]) -> Reference:
    """Where transformers has no such model: what the numpy reference of the tests computes, in float64.

    The yardstick in 16 bits is the same with what norms give rounded to bfloat16.
    """
    judge = REFERENCES[name](checkpoint)
    logits = np.stack([judge.logits(ids.tolist()) for ids in sequences]).astype(np.float32)
    with rounded_activations():
        stored = np.stack([judge.logits(ids.tolist()) for ids in sequences]).astype(np.float32)
    prompt = sequences[0, :PROMPT_TOKENS]
    continued = np.array(greedy(judge, prompt, NEW_TOKENS)[PROMPT_TOKENS:], np.int64)
    return computed_reference(sequences, logits, prompt, continued, stored=stored)


def make_encoder_decoder_reference(name: str, checkpoint: Path, sequences: NDArray[np.int64]) -> Reference:
    """What the judge of the tests says of decoders' tokens behind random sources of 70 tokens."""
    judge = Judge(name, checkpoint)
    sources = np.random.default_rng(2).integers(3, judge.vocab_size, (len(sequences), SOURCE_TOKENS))
    pairs = list(zip(sources.tolist(), sequences.tolist(), strict=True))
    in_16_bits = Judge(name, checkpoint, torch.bfloat16)
    logits, stored = (
        np.concatenate([each.logits(source, tokens) for source, tokens in pairs]).astype(np.float32)
        for each in (judge, in_16_bits)
    )
    greedy_tokens = np.array(judge.greedy(sources[0].tolist(), NEW_TOKENS)[1:], np.int64)
    return computed_reference(sequences, logits, sources[0], greedy_tokens, sources, stored)


def example_sequences() -> NDArray[np.int64]:
    """``[S, L]`` of the language that the trained example knows: the texts in its README."""
    from tokenizers import Tokenizer

    lines = (EXAMPLE / "README.md").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line.removeprefix("> ") for line in lines if line.startswith("> "))
    ids = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")).encode(text).ids
    count = len(ids) // TOKENS
    return np.array(ids[: count * TOKENS], np.int64).reshape(count, TOKENS)


def folder_bytes(folder: Path) -> int:
    """Of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _timed(name: str, make: Callable[[], Path]) -> dict[str, Any]:
    start = time.perf_counter()
    made = make()
    return {"made": name, "seconds": time.perf_counter() - start, "MiB": folder_bytes(made) / 2**20}


if __name__ == "__main__":
    main()
