"""Bundles with quantized weights against transformers eager with the same weights, dequantized, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import runtime
from moec.artifacts.quantization import Quantization
from moec.compiler.quantization import policy_named
from moec.compiler.quantization.dense import LEAST
from moec.formats import FORMATS, METHODS, dequantize
from tests.end_to_end.test_models import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    RELATIVE,
    random_ids,
    reference,
    relative_error,
)
from tests.support.compiling import compile_checkpoint
from tests.support.tiny_models import save

CANARY = ("deepseek_v2_lite", "int4-g32")
MODELS = ("deepseek_v2_lite", "gpt_oss", "mixtral", "qwen2_moe")
ROUTERS = (".gate.weight", ".router.weight", "shared_expert_gate.weight")
LATENT = "kv_b_proj.weight"
"""Matrices of latent attention stay plain."""


def cases() -> list[Any]:
    """Every format on one model, one format on the others; one pair in ``make test``."""
    pairs = [(MODELS[0], name) for name in FORMATS] + [(model, "mxfp4") for model in MODELS[1:]]
    return [pair if pair == CANARY else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("model_name", "format_name"), cases())
def test_a_bundle_computes_with_what_its_codes_stand_for(
    model_name: str, format_name: str, tmp_path: Path
) -> None:
    save(model_name, tmp_path / "checkpoint", dtype=torch.float32)
    policy = policy_named(format_name)
    compile_checkpoint(tmp_path / "checkpoint", tmp_path / "model.moec", dtype="f32", quantization=policy)
    judge = reference(tmp_path / "checkpoint")
    round_weights(judge, policy)
    ids = random_ids(judge.config.vocab_size, 1, PROMPT_TOKENS)
    with torch.inference_mode():
        expected = judge.generate(torch.from_numpy(ids), max_new_tokens=NEW_TOKENS, do_sample=False).numpy()
        logits = judge(torch.from_numpy(expected)).logits.numpy()
    with runtime.load(tmp_path / "model.moec", max_step_tokens=48) as model:
        found = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=[])
        np.testing.assert_array_equal(found, expected)
        assert relative_error(model.forward(expected), logits) < RELATIVE


def round_weights(model: torch.nn.Module, policy: Quantization) -> None:
    """Round matrices to what the policy's formats can say, in place."""
    transposed = {name for name, module in model.named_modules() if getattr(module, "is_transposed", False)}
    rounded = {"experts": 0, "linear": 0}
    for name, parameter in model.named_parameters():
        role = "experts" if parameter.ndim == 3 else "linear"
        plain = name.endswith((*ROUTERS, LATENT)) or "bias" in name
        if plain or parameter.ndim < 2 or min(parameter.shape[-2:]) < LEAST:
            continue
        across = role == "experts" and name.rpartition(".")[0] in transposed
        for matrix in parameter.data if role == "experts" else [parameter.data]:
            rows = matrix.T if across else matrix
            kind = FORMATS[policy.roles[role]]
            values = dequantize(kind, METHODS["nearest"](kind, rows.contiguous().numpy()))
            rows.copy_(torch.from_numpy(values))
        rounded[role] += 1
    assert all(rounded.values())
