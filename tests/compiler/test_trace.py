"""What trace makes of whole models, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from moec.compiler.trace import trace
from moec.compiler.tracing.markers import ATTENTION, EXPERTS
from moec.compiler.tracing.model.build import build_config
from moec.errors import CheckpointError, UnsupportedModelError
from tests.support.graphs import traced
from tests.support.tiny_models import TINY, build


def config(name: str, **changes: Any) -> dict[str, Any]:
    return {**TINY[name]().to_dict(), **changes}


def markers(graph: torch.fx.Graph, target: str) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if str(node.target) == target]


def test_a_model_has_a_marker_for_each_attention_and_each_experts_module() -> None:
    model = traced("deepseek_v3")
    graph = model.graph.graph
    assert [node.args[9] for node in markers(graph, ATTENTION)] == [
        f"model.layers.{i}.self_attn" for i in range(3)
    ]
    assert [node.args[3] for node in markers(graph, EXPERTS)] == [
        f"model.layers.{i}.mlp.experts" for i in (1, 2)
    ]
    assert model.class_name == "DeepseekV3ForCausalLM"
    assert (model.vocab_size, model.hidden_size) == (157, 64)


def test_no_size_of_the_graph_is_the_example_length() -> None:
    model = traced("mixtral")
    (logits,) = next(reversed(model.graph.graph.nodes)).all_input_nodes
    assert [str(size) for size in logits.meta["val"].shape] == ["1", model.symbol, "131"]


def test_latent_attention_caches_its_latents() -> None:
    model = traced("deepseek_v2")
    node = markers(model.graph.graph, ATTENTION)[0]
    query, key, value = node.args[:3]
    assert isinstance(query, torch.fx.Node)
    assert isinstance(key, torch.fx.Node)
    assert value is None
    assert query.meta["val"].shape[2:] == (4, 24)
    assert key.meta["val"].shape[2:] == (1, 40)
    assert node.meta["val"].shape[2:] == (4, 12)


def test_nodes_know_their_module() -> None:
    model = traced("mixtral")
    modules = {node.meta["module"] for node in model.graph.graph.nodes if node.op == "call_function"}
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate", "lm_head"} <= modules


def test_numbers_that_json_has_no_word_for_are_read_as_transformers_writes_them() -> None:
    config = build_config(
        {**TINY["granitemoehybrid"]().to_diff_dict(), "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    )
    assert config.time_step_limit == (0.0, float("inf"))


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "minimax_m2"])
def test_graphs_compute_in_float32(name: str) -> None:
    values = [node.meta.get("val") for node in traced(name, "bfloat16").graph.graph.nodes]
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    assert dtypes <= {torch.float32, torch.int64, torch.int32, torch.bool}


def test_parameters_that_transformers_keeps_wide_stay_wide() -> None:
    model = traced("deepseek_v3", "bfloat16")
    dtypes = model.stored
    assert dtypes["model.layers.1.mlp.gate.e_score_correction_bias"] == torch.float32
    assert dtypes["model.layers.1.mlp.gate.weight"] == torch.bfloat16


def test_frequencies_are_those_of_a_real_model() -> None:
    model = traced("gpt_oss")
    expected = dict(build("gpt_oss").named_buffers())["model.rotary_emb.inv_freq"]
    assert torch.equal(model.constants["model.rotary_emb.inv_freq"], expected)


def test_how_a_checkpoint_is_stored_does_not_matter() -> None:
    stored = config(
        "deepseek_v3", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    before = copy.deepcopy(stored)
    traced = trace(stored, dtype="bfloat16", max_context=128)
    assert traced.experts["model.layers.1.mlp.experts"].dtype == "bfloat16"
    assert stored == before


def test_tracing_leaves_transformers_as_it_was() -> None:
    from transformers import AttentionInterface
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as modeling

    before = modeling.apply_rotary_emb
    trace(config("deepseek_v2"), dtype="float32", max_context=128)
    assert modeling.apply_rotary_emb is before
    assert "moec" not in AttentionInterface._global_mapping


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "names no model_type"),
        ({"model_type": "no_such_model"}, "Unknown model type 'no_such_model'"),
        ({"model_type": "doge"}, "doge models do not compile yet"),
        ({"model_type": "bart"}, "BartForConditionalGeneration is not a Mixture-of-Experts model"),
        ({"model_type": "vit"}, "vit has no causal language model"),
    ],
)
def test_types_that_do_not_compile(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        trace(raw, dtype="float32", max_context=128)


def test_a_dense_model_is_refused() -> None:
    dense = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is not a Mixture-of-Experts model"):
        trace(dense.to_dict(), dtype="float32", max_context=128)


def test_a_config_that_does_not_build_is_named() -> None:
    with pytest.raises(CheckpointError, match="does not describe a mixtral model"):
        trace(config("mixtral", hidden_size="wide"), dtype="float32", max_context=128)


def test_a_model_that_looks_at_the_number_of_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral import modeling_mixtral as modeling

    class Fussy(modeling.MixtralRMSNorm):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = super().forward(x)
            return result if x.shape[1] > 8 else result * 2

    monkeypatch.setattr(modeling, "MixtralRMSNorm", Fussy)
    with pytest.raises(UnsupportedModelError, match="different things for different numbers of tokens"):
        trace(config("mixtral"), dtype="float32", max_context=128)


def test_an_unknown_attention_argument_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral import modeling_mixtral as modeling

    class Biased(modeling.MixtralAttention):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs, dropped_heads=kwargs["hidden_states"])

    monkeypatch.setattr(modeling, "MixtralAttention", Biased)
    with pytest.raises(UnsupportedModelError, match=r"MixtralForCausalLM \(Biased\).*dropped_heads=Tensor"):
        trace(config("mixtral"), dtype="float32", max_context=128)


def test_an_unknown_mask_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import create_causal_mask
    from transformers.models.mixtral import modeling_mixtral as modeling

    def everything(*_: Any) -> bool:
        return True

    def masked(*args: Any, **kwargs: Any) -> Any:
        return create_causal_mask(*args, **kwargs, or_mask_function=everything)

    monkeypatch.setattr(modeling, "create_sliding_window_causal_mask", masked)
    with pytest.raises(UnsupportedModelError, match=r"MixtralForCausalLM uses an attention mask.*or_mask"):
        trace(config("mixtral"), dtype="float32", max_context=128)


def test_an_expert_that_is_normalised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral import modeling_mixtral as modeling

    class Normalised(modeling.MixtralExperts):  # type: ignore[misc]
        def __init__(self, settings: Any) -> None:
            super().__init__(settings)
            self.has_post_expert_norm = True

    monkeypatch.setattr(modeling, "MixtralExperts", Normalised)
    with pytest.raises(UnsupportedModelError, match="normalises the output of each expert"):
        trace(config("mixtral"), dtype="float32", max_context=128)
