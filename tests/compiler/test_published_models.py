"""Where transformers and the published model are not the same: what moec does, and that it is still needed."""

from __future__ import annotations

import torch
import transformers

from moec.compiler.tracing.build import build_config, build_model
from tests.support.tiny_models.foreign import REMADE


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
