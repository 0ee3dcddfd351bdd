"""Models that see or hear as well: their language model alone, fed with tokens.

The whole model is built, without memory, so that the checkpoint's names mean what they mean to transformers; only its
language model and head are run. All positions are those of text: the rows of a multimodal rotation are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class TextHalf:
    """Where in a model of transformers the language model is."""

    model: str
    """Class of the whole model, in transformers' namespace."""
    language: str = "model.language_model"
    """Path of the module from tokens to hidden states."""
    head: str = "lm_head"
    """Path of the module from hidden states to logits."""
    softcap: bool = False
    """Logits are bounded by the text config's ``final_logit_softcapping``."""

    whole: str = ""
    """Path of the module that transformers' own forward is of, from token ids to logits; empty: the model itself."""

    def has(self, path: str) -> bool:
        """Whether a module or parameter is part of it."""
        return any(path == part or path.startswith(f"{part}.") for part in (self.language, self.head))

    def run(self, model: Any) -> None:
        """Make the forward of ``model`` that of its language model: ``input_ids`` and ``position_ids`` to logits."""
        language, head = model.get_submodule(self.language), model.get_submodule(self.head)
        cap = model.config.get_text_config().final_logit_softcapping if self.softcap else None

        def forward(_: Any, **inputs: torch.Tensor) -> CausalLMOutputWithPast:
            logits = head(language(**inputs).last_hidden_state)
            return CausalLMOutputWithPast(logits=logits if cap is None else torch.tanh(logits / cap) * cap)

        model.forward = MethodType(forward, model)


TEXT_HALVES: dict[str, TextHalf] = {
    "aria": TextHalf("AriaForConditionalGeneration"),
    "deepseek_ocr2": TextHalf("DeepseekOcr2ForConditionalGeneration"),
    "ernie4_5_vl_moe": TextHalf("Ernie4_5_VLMoeForConditionalGeneration"),
    "gemma4": TextHalf("Gemma4ForConditionalGeneration", softcap=True),
    "glm5_next": TextHalf("Glm5NextForConditionalGeneration"),
    "glm4v_moe": TextHalf("Glm4vMoeForConditionalGeneration"),
    "llama4": TextHalf("Llama4ForConditionalGeneration", "language_model.model", "language_model.lm_head"),
    "dots3_note": TextHalf("Dots3NoteForConditionalGeneration"),
    "minimax_m3_vl": TextHalf("MiniMaxM3SparseForConditionalGeneration"),
    "mistral_large4": TextHalf("MistralLarge4ForConditionalGeneration", softcap=True),
    "mistral4": TextHalf("Mistral4ForCausalLM", "model"),
    "qwen3_5_moe": TextHalf("Qwen3_5MoeForConditionalGeneration"),
    "qwen3_omni_moe": TextHalf(
        "Qwen3OmniMoeForConditionalGeneration",
        "thinker.model.language_model",
        "thinker.lm_head",
        whole="thinker",
    ),
    "qwen3_vl_moe": TextHalf("Qwen3VLMoeForConditionalGeneration"),
    "step3p7": TextHalf("Step3p7ForConditionalGeneration"),
}
"""``model_type`` -> its text half."""


KINDS = ("image", "video", "audio")
"""What tokens can stand for: a config has ``<kind>_token_id`` for each that its model reads."""


def placeholders(config: Any) -> dict[str, int]:
    """What a model reads beside text, and the token id that stands for it, by the model's config."""
    half = TEXT_HALVES.get(config.model_type)
    if half is None:
        return {}
    part = getattr(config, f"{half.whole}_config") if half.whole else config
    found = {kind: getattr(part, f"{kind}_token_id", None) for kind in KINDS}
    return {kind: int(token) for kind, token in found.items() if token is not None}


def transformers_class(model_type: str) -> Any:
    """The class of transformers that loads checkpoints of this type."""
    half = TEXT_HALVES.get(model_type)
    return transformers.AutoModelForCausalLM if half is None else getattr(transformers, half.model)


def from_tokens(model: Any) -> Any:
    """The module of a model as transformers made it whose forward takes token ids and gives logits."""
    half = TEXT_HALVES.get(model.config.model_type)
    return model if half is None else model.get_submodule(half.whole)


def used_modules(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Paths and modules of ``model`` but those of its other halves."""
    half = TEXT_HALVES.get(getattr(model.config, "model_type", ""))
    for path, module in model.named_modules():
        if half is None or half.has(path):
            yield path, module
