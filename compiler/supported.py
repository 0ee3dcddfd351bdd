"""What ``moec models`` prints: every Mixture-of-Experts type, and how far moec goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["supported", "untested", "unsupported"]

STATE_MARKER = "its layers keep a recurrent or convolution state, which moec has no marker for"
MASK_TENSOR = "it builds attention masks as tensors, which no kernel takes"
VISION = "its positions come from images, which the chain has no input for"
OWN_EXPERTS = "its experts do not go through transformers' experts interface"
NO_MODEL = "transformers has no causal language model of this type"
ENCODER = "it is an encoder-decoder model; moec compiles decoders only"


@dataclass(frozen=True)
class ModelState:
    """How far moec goes with one model type."""

    state: State
    """``supported``: tested against transformers, or against a reference of our own where transformers has no model.
    ``untested``: takes the generic path, without a test.
    """
    reason: str = ""
    """Why it is unsupported."""


def _table() -> dict[str, ModelState]:
    table: dict[str, ModelState] = {}
    supported = (
        "arctic deepseek_v2 deepseek_v3 ernie4_5_moe glm4_moe gpt_oss granitemoe grok grok-1 minimax_m2 mixtral "
        "olmoe phimoe qwen2_moe qwen3_moe"
    )
    untested = (
        "afmoe aria_text axk1 beam cohere2_moe dots1 exaone_moe flex_olmo flint gemma4_text glm4_moe_lite "
        "granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 kolibri1 laguna mellum mimo_v2_flash "
        "minimax_m3_vl_text solar_open"
    )
    reasons = {
        STATE_MARKER: "bailing_hybrid deepseek_v4 glm5_next granitemoehybrid inkling2_text inkling_text jamba "
        "kimi_linear lfm2_moe minimax nemotron_h qwen3_5_moe qwen3_5_moe_text qwen3_next zaya",
        MASK_TENSOR: "axk2 deepseek_v32 doge dots3_note glm_moe_dsa hy_v4",
        VISION: "aria gemma4 minimax_m3_vl",
        OWN_EXPERTS: "dbrx jetmoe llama4 llama4_text longcat_flash qwen4_exp",
        NO_MODEL: "deepseek_ocr2 diffusion_gemma ernie4_5_vl_moe glm4v_moe inkling2 mistral4 mistral_large4 "
        "muse_spark openai_privacy_filter qwen3_omni_moe qwen3_vl_moe step3p7 unlimited_ocr",
        ENCODER: "nllb-moe switch_transformers",
    }
    table |= {name: ModelState("supported") for name in supported.split()}
    table |= {name: ModelState("untested") for name in untested.split()}
    for reason, names in reasons.items():
        table |= {name: ModelState("unsupported", reason) for name in names.split()}
    return dict(sorted(table.items()))


MODELS: dict[str, ModelState] = _table()
"""Model type to state. A type that is not here is tried the generic way if transformers has experts in it."""
