"""Tiny bundles of quantized weights, with what transformers computes on the values that the weights stand for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.support.references import make_reference
from moec.compiler.reference import transformers_network
from moec.formats import ALIASES, FORMATS
from tests.support.dequantized import dequantize_dense, dequantize_experts, round_dense
from tests.support.quantized_checkpoints import fp8_deepseek_v3, mxfp4_gpt_oss
from tests.support.tiny_models import save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from benchmarks.support.references import Reference
    from tests.support.quantized_checkpoints import Published

RECIPES = {
    f"{model}-{recipe}": (model, recipe)
    for model, recipe in (
        ("deepseek_v2_lite", "int8"),
        ("deepseek_v2_lite", "int4"),
        ("deepseek_v2_lite", "int4-g32-m"),
        ("deepseek_v2_lite", "mxfp4"),
        ("deepseek_v2_lite", "fp8"),
        ("mixtral", "int4-g64-z"),
        ("qwen2_moe", "int4"),
    )
}
"""Name to a tiny model and the recipe by which its weights are rounded."""


def _gpt_oss(folder: Path) -> Published:
    with pytest.MonkeyPatch.context() as patch:
        return mxfp4_gpt_oss(folder, patch)


KEPT: dict[str, Callable[[Path], Published]] = {
    "deepseek_v3-published": fp8_deepseek_v3,
    "gpt_oss-published": _gpt_oss,
}
"""Checkpoints whose own formats are kept."""


def checkpoint_of(name: str, folder: Path) -> tuple[Path, list[str]]:
    """Write the checkpoint of a bundle under ``folder``; options of ``moec compile`` for it."""
    if name in KEPT:
        return KEPT[name](folder).folder, []
    model, recipe = RECIPES[name]
    return save(model, folder / "checkpoint", dtype=torch.bfloat16), ["--quantization", recipe]


def reference_of(name: str, checkpoint: Path, bundle: Path, sequences: NDArray[np.int64]) -> Reference:
    """What transformers computes with the bundle's weights, dequantized, in float32 and rounded to bfloat16."""
    source = checkpoint if name in RECIPES else checkpoint.parent / "plain"
    model_type = json.loads((source / "config.json").read_text())["model_type"]
    network = transformers_network(source, model_type, torch.float32)
    if name in RECIPES:
        kind = RECIPES[name][1]
        dequantize_experts(network, FORMATS[ALIASES.get(kind, kind)])
        dequantize_dense(network, bundle)
    else:
        round_dense(network, bundle)
    network.save_pretrained(checkpoint.parent / "as-packed")
    return make_reference(checkpoint.parent / "as-packed", sequences, "bfloat16")
