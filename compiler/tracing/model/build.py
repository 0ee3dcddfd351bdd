"""From a checkpoint's config to a model without weights."""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers import initialization as init

from moec.compiler.architectures import ARCHITECTURES
from moec.compiler.supported import MODELS
from moec.compiler.tracing.model.corrections import CORRECTIONS
from moec.compiler.tracing.model.foreign_experts import adopt_experts
from moec.compiler.tracing.model.ignored_fields import check_fields
from moec.compiler.tracing.model.text_half import TEXT_HALVES, transformers_class, used_modules
from moec.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.artifacts.model import DType

DTYPES: dict[DType, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""Element types a model can be compiled to."""

FLOAT = "__float__"
"""Key of an object that transformers writes into ``config.json`` for infinities and what is no number."""


def build_config(raw: dict[str, Any]) -> Any:
    """The config of transformers, or of an architecture of our own, for a ``config.json``.

    Keys that say how the checkpoint is stored (``quantization_config``) are dropped: packing undoes that
    storage.

    Raises:
        UnsupportedModelError: the type is missing or unknown, or is of a kind that moec cannot compile.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UnsupportedModelError(
            "The config names no model_type.", "", "Is this a transformers checkpoint?"
        )
    state = MODELS.get(model_type)
    if state is not None and state.state == "unsupported":
        raise UnsupportedModelError(
            f"{model_type} models do not compile yet.", state.reason, "See `moec models`."
        )
    own = ARCHITECTURES.get(model_type)
    if own is None and model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"Unknown model type {model_type!r}",
            "transformers has no model of this type, and moec never runs code from a checkpoint.",
            "`moec models` lists the types that compile.",
        )
    check_fields(model_type, raw)
    fields = _with_floats({key: value for key, value in raw.items() if key != "quantization_config"})
    fields.pop("model_type")
    if model_type in CORRECTIONS:
        CORRECTIONS[model_type](fields)
    with _described(model_type):
        return AutoConfig.for_model(model_type, **fields) if own is None else own.config(**fields)


def _with_floats(value: Any) -> Any:
    """A deep copy in which numbers that JSON has no word for are numbers: ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        if set(value) == {FLOAT}:
            return float(value[FLOAT])
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else copy.deepcopy(value)


def build_model(config: Any, dtype: torch.dtype) -> Any:
    """A language model for ``config`` on the meta device, causal or behind an encoder, in evaluation mode.

    Raises:
        UnsupportedModelError: transformers has no such model for this config, or it has no routed experts.
    """
    make = _maker(config)
    config.output_router_logits = False
    with _described(config.model_type), torch.device("meta"), init.meta_device_safe_creation_ops():
        model = make(config, dtype=dtype)
    if config.model_type in TEXT_HALVES:
        TEXT_HALVES[config.model_type].run(model)
    model.eval()
    model.tie_weights()
    adopt_experts(model)
    if not expert_modules(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a Mixture-of-Experts model, or not one that moec can see into.",
            "None of its modules goes through transformers' experts interface, or is adopted by moec.",
            "`moec models` lists the types that compile.",
        )
    _keep_in_float32(model, dtype)
    return model


def _maker(config: Any) -> Any:
    """What makes the model of a config: a class of our own, one that also sees or hears, or a language model's.

    Raises:
        UnsupportedModelError: transformers has no such model for this config.
    """
    if config.model_type in ARCHITECTURES:
        return ARCHITECTURES[config.model_type].model._from_config
    if config.model_type in TEXT_HALVES:
        return transformers_class(config.model_type)._from_config
    family = AutoModelForSeq2SeqLM if has_encoder(config) else AutoModelForCausalLM
    if type(config) not in family._model_mapping:
        raise UnsupportedModelError(
            f"{config.model_type} has no causal language model in transformers.",
            "",
            "`moec models` lists the types that compile.",
        )
    return family.from_config


@contextmanager
def _described(model_type: str) -> Iterator[None]:
    """Name the type where transformers stumbles over what the config says."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"The config does not describe a {model_type} model.",
            f"transformers {transformers.__version__} says: {type(error).__name__}: {str(error)[:300]}",
            "Check config.json against the model's page.",
        ) from error


def has_encoder(config: Any) -> bool:
    """Whether the model has an encoder in front of its decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def expert_modules(model: torch.nn.Module) -> dict[str, Any]:
    """Path to module, for the modules behind transformers' experts interface."""
    flags = ("has_gate", "is_transposed", "is_concatenated", "has_bias")
    return {
        path: module for path, module in used_modules(model) if all(hasattr(module, flag) for flag in flags)
    }


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Make float32 what transformers loads in float32, by the same patterns as its loader."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern = re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in plan))
    for module_path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                path = f"{module_path}.{name}"
                if tensor is None or name in module._non_persistent_buffers_set or not pattern.search(path):
                    continue
                wide = tensor.float()
                table[name] = (
                    torch.nn.Parameter(wide, requires_grad=False) if table is module._parameters else wide
                )
