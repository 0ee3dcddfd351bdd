"""Bundles with quantized weights against transformers eager with the same weights, dequantized, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import runtime
from moec.artifacts.quantization import Quantization
from moec.formats import FORMATS, METHODS, Format, dequantize
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


def cases() -> list[Any]:
    """Every format on one model, one format on the others; one pair in ``make test``."""
    pairs = [(MODELS[0], name) for name in FORMATS] + [(model, "mxfp4") for model in MODELS[1:]]
    return [pair if pair == CANARY else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("model_name", "format_name"), cases())
def test_quantized_experts_are_those_of_dequantized_weights(
    model_name: str, format_name: str, tmp_path: Path
) -> None:
    save(model_name, tmp_path / "checkpoint", dtype=torch.float32)
    policy = Quantization("experts", "nearest", {"experts": format_name}, ())
    compile_checkpoint(tmp_path / "checkpoint", tmp_path / "model.moec", dtype="f32", quantization=policy)
    judge = reference(tmp_path / "checkpoint")
    dequantize_experts(judge, FORMATS[format_name])
    ids = random_ids(judge.config.vocab_size, 1, PROMPT_TOKENS)
    with torch.inference_mode():
        expected = judge.generate(torch.from_numpy(ids), max_new_tokens=NEW_TOKENS, do_sample=False).numpy()
        logits = judge(torch.from_numpy(expected)).logits.numpy()
    with runtime.load(tmp_path / "model.moec", max_step_tokens=48) as model:
        found = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=[])
        np.testing.assert_array_equal(found, expected)
        assert relative_error(model.forward(expected), logits) < RELATIVE


def dequantize_experts(model: torch.nn.Module, kind: Format) -> None:
    """Round every routed expert's matrices to what ``kind`` can say, in place."""
    rounded = 0
    for module in model.modules():
        for name in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"):
            weight = getattr(module, name, None)
            if not isinstance(weight, torch.nn.Parameter) or weight.ndim != 3:
                continue
            across = 1 if getattr(module, "is_transposed", False) else 2
            for expert in weight.data:
                rows = expert.T if across == 1 else expert
                values = dequantize(kind, METHODS["nearest"](kind, rows.contiguous().numpy()))
                rows.copy_(torch.from_numpy(values))
            rounded += 1
    assert rounded
