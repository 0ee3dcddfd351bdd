"""Fields of configs that the published model reads and transformers does not: other values would be another model."""

from __future__ import annotations

from typing import Any

from moec.errors import UnsupportedModelError

IGNORED: dict[str, dict[str, tuple[Any, ...]]] = {
    "deepseek_v2": {"norm_topk_prob": (False,), "scoring_func": ("softmax",), "moe_layer_freq": (1,)},
    "deepseek_v3": {"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",), "moe_layer_freq": (1,)},
    "deepseek_v32": {"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",)},
}
"""Model type -> field -> the values that transformers' model stands for."""


def check_fields(model_type: str, raw: dict[str, Any]) -> None:
    """Refuse what transformers would silently compute otherwise.

    Raises:
        UnsupportedModelError: a field has a value that transformers ignores.
    """
    for name, values in IGNORED.get(model_type, {}).items():
        value = raw.get(name)
        if value is not None and value not in values:
            raise UnsupportedModelError(
                f"The config says {name}={value!r}, which transformers' {model_type} ignores.",
                f"It computes as if it were {values[0]!r}, which is another model.",
                "See `moec models` for the types that compile.",
            )
