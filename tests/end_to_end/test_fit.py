"""``moec compile --fit``: a bundle whose formats were chosen is the model of their weights, and says what they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from moec import runtime
from moec.__main__ import run
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.files.records import read_record
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.packing import PackingRecord
from moec.compiler.profiling.calibration import DEFAULT_PROMPTS, read_prompts
from moec.compiler.reference import compare
from moec.formats import FORMATS, METHODS, dequantize
from tests.support.agreement import SHORT_RELATIVE, check_agreement, expected_of, reference
from tests.support.dequantized import take_experts
from tests.support.tiny_models import save

if TYPE_CHECKING:
    from moec.artifacts.fit import FittedUnit

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-deepseek-v2"
PROMPTS = (
    '{"token_ids": [5, 17, 2, 40, 33, 9, 71]}\n{"token_ids": [8, 3, 60, 11, 12, 13, 90, 45, 7, 7, 31]}\n'
)


@pytest.mark.slow
def test_a_fitted_bundle_runs_in_the_size_it_was_fitted_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("mixtral", tmp_path / "checkpoint", dtype=torch.float32)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(PROMPTS)

    def compiled(target: str) -> Path:
        output = tmp_path / f"{target}.moec"
        arguments = ["compile", str(tmp_path / "checkpoint"), "-o", str(output), "--fit", target]
        assert run([*arguments, "--calibration", str(prompts)]) == 0
        return output

    whole = open_bundle(compiled("1GiB"), verify="sizes")
    everything = footprint(whole.model)
    assert whole.manifest.fit is not None
    assert {unit.format for unit in whole.manifest.fit.units} == {"plain"}
    weights = everything.dense_bytes + everything.experts_bytes
    limit = whole.manifest.fit.resident_bytes - weights // 2
    path = compiled(str(limit))
    bundle = open_bundle(path, verify="sizes")
    chosen = bundle.manifest.fit
    assert chosen is not None
    assert chosen.resident_bytes <= limit
    packing = read_record(PackingRecord, "packing", path / "packing.json")
    assert packing.fit == chosen
    assert bundle.manifest.quantization == f"fit-{limit}"
    capsys.readouterr()
    assert run(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fit"]["target"] == str(limit)
    assert run(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"chosen for {limit}" in said
    for unit in chosen.units:
        assert unit.name in said
    judge = reference(tmp_path / "checkpoint")
    round_units(judge, chosen.units)
    with runtime.load(path, max_step_tokens=48) as model:
        check_agreement(model, expected_of(judge, within=SHORT_RELATIVE), within=SHORT_RELATIVE)


@pytest.mark.slow
def test_the_trained_example_is_fitted_and_rounded_with_feedback(tmp_path: Path) -> None:
    """It is the model of the weights that were packed, which is nearer to the unrounded one than nearest codes are."""
    path = tmp_path / "model.moec"
    arguments = ["compile", str(EXAMPLE), "-o", str(path), "--dtype", "f32", "--fit", "20MiB"]
    assert run([*arguments, "--method", "feedback"]) == 0
    bundle = open_bundle(path, verify="sizes")
    chosen = bundle.manifest.fit
    assert chosen is not None
    assert chosen.resident_bytes <= 20 << 20
    policy = read_record(PackingRecord, "packing", path / "packing.json").quantization
    assert policy is not None
    assert policy.method == "feedback"
    judge, nearest, plain = (reference(EXAMPLE) for _ in range(3))
    round_units(nearest, chosen.units)
    round_units(judge, chosen.units)
    take_experts(judge, path)
    differing = [
        name
        for name, value in judge.state_dict().items()
        if not torch.equal(value, nearest.state_dict()[name])
    ]
    assert {name.split(".")[2] for name in differing} == {str(layer) for layer in range(1, 7)}
    with runtime.load(path, max_step_tokens=48) as model:
        check_agreement(model, expected_of(judge, within=SHORT_RELATIVE), within=SHORT_RELATIVE)
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    texts = [tokenizer.encode(prompt.text or "").ids for prompt in read_prompts(DEFAULT_PROMPTS)]
    found = [
        compare(texts, logits_of(plain, texts), logits_of(other, texts)).mean_kl for other in (judge, nearest)
    ]
    assert found[0] < found[1]


def logits_of(model: Any, texts: list[list[int]]) -> Iterator[NDArray[np.float32]]:
    with torch.inference_mode():
        for ids in texts:
            yield model(torch.tensor([ids])).logits[0].numpy()


def round_units(model: torch.nn.Module, units: tuple[FittedUnit, ...]) -> None:
    """Put what each unit's format can say in the place of its weights."""
    weights = model.state_dict()
    for unit in units:
        experts = [name for name in weights if name.startswith(f"{unit.name}.")]
        for name in experts if unit.role == "experts" else unit.parameters:
            if unit.format != "plain":
                kind, rows = FORMATS[unit.format], weights[name].reshape(-1, weights[name].shape[-1])
                rounded = dequantize(kind, METHODS["nearest"](kind, rows.numpy()))
                weights[name].copy_(torch.from_numpy(rounded).reshape(weights[name].shape))
