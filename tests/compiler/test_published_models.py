"""Where transformers and the published model are not the same: what moec does, and that it is still needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.packing import pack
from moec.compiler.partition import partition
from moec.compiler.trace import trace
from moec.compiler.tracing.model.build import build_config, build_model
from moec.compiler.tracing.model.rope import fix_rotary_tables
from tests.support.graphs import GENERATION
from tests.support.tiny_models import TINY, save
from tests.support.tiny_models.foreign import REMADE

if TYPE_CHECKING:
    from pathlib import Path

MODEL = "model.safetensors"


def test_dbrx_rotates_with_the_base_of_its_attention() -> None:
    published = {"clip_qkv": 8.0, "kv_n_heads": 8, "rope_theta": 500000.0}
    config = build_config({"model_type": "dbrx", "attn_config": published})
    assert config.rope_parameters["rope_theta"] == 500000.0
    theirs = transformers.DbrxConfig(attn_config=published)
    assert theirs.rope_parameters["rope_theta"] == 10000.0, "transformers reads it now: the correction can go"


def test_longcat_flash_has_no_weights_for_experts_that_compute_nothing() -> None:
    config = REMADE["longcat_flash"]()
    with torch.device("meta"):
        theirs = transformers.LongcatFlashForCausalLM(config)
    ours = build_model(config, torch.float32)
    path = "model.layers.0.mlp.experts.gate_up_proj"
    assert ours.state_dict()[path].shape[0] == config.n_routed_experts
    assert theirs.state_dict()[path].shape[0] > config.n_routed_experts, "transformers has mended it"


def test_phi_takes_the_frequencies_of_its_context() -> None:
    """Published: the long factors, and the scale that belongs to them, beyond the original context."""
    rope = TINY["phimoe"]().rope_parameters | {"original_max_position_embeddings": 128}
    config = build_config(TINY["phimoe"]().to_dict() | {"rope_parameters": rope})
    rates = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    for context, kind in ((128, "short"), (129, "long")):
        model = build_model(config, torch.float32)
        (frequencies,) = fix_rotary_tables(model, context).values()
        torch.testing.assert_close(frequencies, rates / torch.tensor(rope[f"{kind}_factor"]))
        assert model.model.rotary_emb.attention_scaling == rope[f"{kind}_mscale"]
    theirs = PhimoeRotaryEmbedding(config)(torch.zeros(1, 1, 1), torch.tensor([[200]]))[0]
    short = 200 * rates / torch.tensor(rope["short_factor"])
    torch.testing.assert_close(
        theirs[0, 0, :8], short.cos() * rope["long_mscale"], msg="transformers has mended it"
    )


@pytest.mark.slow
def test_zaya_has_the_bias_of_its_checkpoint_on_the_expert_that_is_skipped(tmp_path: Path) -> None:
    """Training balances it like the other biases; transformers sets it anew in what it has loaded."""
    name, file = "model.layers.1.mlp.gate.balancing_biases", save("zaya", tmp_path / "model") / MODEL
    tensors = load_file(file)
    tensors[name][-1] = 0.25
    save_file(tensors, file, metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert theirs.state_dict()[name][-1] == -1.0, "transformers keeps it now: the note can go"
    checkpoint = open_checkpoint(tmp_path / "model")
    traced = trace(checkpoint.config, dtype="float32", max_context=64)
    parts = partition(traced, generation=GENERATION, config_sha256=checkpoint.config_sha256)
    pack(checkpoint, parts.model, parts.packing, parts.constants, tmp_path / "out")
    packed = load_file(tmp_path / "out/weights/dense.safetensors")
    torch.testing.assert_close(packed[name], tensors[name], rtol=0, atol=0)
