"""What ``moec models`` prints: every Mixture-of-Experts type, and how far moec goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["supported", "untested", "unsupported"]

RELATIVE_LOGITS = "its attention adds logits of query and distance to the scores, which no kernel takes"
COMPRESSED_KEYS = "its attention compresses the keys of neighbouring tokens into one, which no kernel does"
LOOKED_UP = (
    "its experts are single neurons found by product keys, its attention mask is learned, and transformers' router "
    "mixes the tokens of a call, so that a prompt gives other logits than its tokens one by one"
)
DIFFUSION = "it fills blocks of tokens in both directions, step by step, instead of predicting the next one"
LABELS = "it labels tokens, reading in both directions, and predicts none"
NORMED_EXPERTS = "it normalises what each expert gives before the sum, and no kernel does that"
PROMPT_AND_WINDOW = (
    "its attention sees the whole prompt and a window of what followed, and no kernel has that mask"
)
N_GRAMS = "it looks up hashes of the last few tokens, cut at end tokens, and a step has none of the tokens before it"


@dataclass(frozen=True)
class ModelState:
    """How far moec goes with one model type."""

    state: State
    """``supported``: tested against transformers, or against a reference of our own where transformers has no model.
    ``untested``: takes the generic path, without a test.
    """
    reason: str = ""
    """Why it is unsupported."""
    note: str = ""
    """What a person who uses it should know."""


SUPPORTED = ModelState("supported")
TEXT_HALF = ModelState("supported", note="the language model alone: prompts are text")
WHOLE = ModelState(
    "supported", note="only contexts that its indexer selects whole: --max-context says how long"
)
WHOLE_TEXT = ModelState("supported", note=f"{TEXT_HALF.note}; {WHOLE.note}")


def noted(note: str) -> ModelState:
    """A supported type with something to know."""
    return ModelState("supported", note=note)


def unsupported(reason: str) -> ModelState:
    """A type that does not compile."""
    return ModelState("unsupported", reason)


MODELS: dict[str, ModelState] = {
    "afmoe": SUPPORTED,
    "arctic": SUPPORTED,
    "aria": TEXT_HALF,
    "aria_text": SUPPORTED,
    "axk1": SUPPORTED,
    "axk2": SUPPORTED,
    "bailing_hybrid": SUPPORTED,
    "beam": SUPPORTED,
    "cohere2_moe": SUPPORTED,
    "dbrx": noted(
        "rotates with attn_config.rope_theta as published; transformers 5.23 takes its own default"
    ),
    "deepseek_ocr2": TEXT_HALF,
    "deepseek_v2": SUPPORTED,
    "deepseek_v3": SUPPORTED,
    "deepseek_v32": SUPPORTED,
    "deepseek_v4": unsupported(COMPRESSED_KEYS),
    "diffusion_gemma": unsupported(DIFFUSION),
    "doge": unsupported(LOOKED_UP),
    "dots1": SUPPORTED,
    "dots3_note": TEXT_HALF,
    "dots3_note_text": SUPPORTED,
    "ernie4_5_moe": SUPPORTED,
    "ernie4_5_vl_moe": noted(f"{TEXT_HALF.note}; its experts for images are left out"),
    "exaone_moe": SUPPORTED,
    "flex_olmo": SUPPORTED,
    "flint": SUPPORTED,
    "gemma4": TEXT_HALF,
    "gemma4_text": SUPPORTED,
    "glm4_moe": SUPPORTED,
    "glm4_moe_lite": SUPPORTED,
    "glm4v_moe": TEXT_HALF,
    "glm5_next": WHOLE_TEXT,
    "glm_moe_dsa": SUPPORTED,
    "gpt_oss": SUPPORTED,
    "granitemoe": SUPPORTED,
    "granitemoe_swa": SUPPORTED,
    "granitemoehybrid": SUPPORTED,
    "granitemoeshared": SUPPORTED,
    "grok": SUPPORTED,
    "grok-1": SUPPORTED,
    "hunyuan_v1_moe": SUPPORTED,
    "hy_v3": SUPPORTED,
    "hy_v4": SUPPORTED,
    "inkling2": unsupported(RELATIVE_LOGITS),
    "inkling2_text": unsupported(RELATIVE_LOGITS),
    "inkling_text": unsupported(RELATIVE_LOGITS),
    "jamba": SUPPORTED,
    "jetmoe": noted("computes all projections of its mixture of attention heads, and uses those chosen"),
    "kimi_linear": SUPPORTED,
    "kolibri1": SUPPORTED,
    "laguna": SUPPORTED,
    "lfm2_moe": SUPPORTED,
    "llama4": TEXT_HALF,
    "llama4_text": SUPPORTED,
    "longcat_flash": noted("checkpoints as published, which transformers 5.23 does not load"),
    "mellum": SUPPORTED,
    "mimo_v2_flash": SUPPORTED,
    "minimax": SUPPORTED,
    "minimax_m2": SUPPORTED,
    "minimax_m3_vl": WHOLE_TEXT,
    "minimax_m3_vl_text": WHOLE,
    "mistral4": TEXT_HALF,
    "mistral_large4": WHOLE_TEXT,
    "mixtral": SUPPORTED,
    "muse_spark": unsupported(NORMED_EXPERTS),
    "nemotron_h": SUPPORTED,
    "nllb-moe": noted("held against a reference of our own: transformers 5.23 runs only two of its experts"),
    "olmoe": SUPPORTED,
    "openai_privacy_filter": unsupported(LABELS),
    "phimoe": noted(
        "rotates as published: with the long frequencies where --max-context is above the original context (4096), "
        "else with the short ones, which transformers 5.23 always takes"
    ),
    "qwen2_moe": SUPPORTED,
    "qwen3_5_moe": TEXT_HALF,
    "qwen3_5_moe_text": SUPPORTED,
    "qwen3_moe": SUPPORTED,
    "qwen3_next": SUPPORTED,
    "qwen3_omni_moe": TEXT_HALF,
    "qwen3_vl_moe": TEXT_HALF,
    "qwen4_exp": unsupported(N_GRAMS),
    "solar_open": SUPPORTED,
    "step3p7": TEXT_HALF,
    "switch_transformers": SUPPORTED,
    "unlimited_ocr": unsupported(PROMPT_AND_WINDOW),
    "zaya": noted(
        "its skip expert's bias is the checkpoint's; transformers 5.23 makes it -1 whatever was loaded"
    ),
}
"""Model type to state. A type that is not here is tried the generic way if transformers has experts in it."""
