"""The table of model types, and generation defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from transformers import CONFIG_MAPPING

from moec.artifacts.model import GenerationDefaults
from moec.compiler.architectures import ARCHITECTURES
from moec.compiler.generation import generation_defaults
from moec.compiler.supported import MODELS
from moec.errors import CheckpointError
from tests.support.tiny_models import TINY
from tests.support.tiny_models.encoder_decoders import ENCODER_DECODERS
from tests.support.tiny_models.foreign import REMADE
from tests.support.tiny_models.own import OWN


def test_supported_is_what_is_tested() -> None:
    tested = {make().model_type for make in {**TINY, **ENCODER_DECODERS, **REMADE}.values()} | {
        config["model_type"] for config, _ in OWN.values()
    }
    assert {name for name, state in MODELS.items() if state.state == "supported"} == tested


def test_unsupported_types_say_why() -> None:
    assert all(bool(state.reason) == (state.state == "unsupported") for state in MODELS.values())


def test_types_exist_in_transformers_or_are_our_own() -> None:
    assert [name for name in MODELS if name not in CONFIG_MAPPING and name not in ARCHITECTURES] == []
    assert [name for name in ARCHITECTURES if name in CONFIG_MAPPING] == []


def test_every_module_with_experts_is_listed() -> None:
    """A type of transformers that goes through the experts interface has a state."""
    folder = Path(transformers.__file__).parent / "models"
    found = {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    }
    listed = {name.removesuffix("_text").replace("-", "_") for name in MODELS}  # folders have no suffix
    assert sorted(found - listed) == []


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (
            {"eos_token_id": 2, "bos_token_id": 1},
            None,
            GenerationDefaults(1, (2,), None, False, 1.0, 50, 1.0, 1.0),
        ),
        (
            {"eos_token_id": 2},
            {"eos_token_id": [3, 4], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
            GenerationDefaults(None, (3, 4), None, True, 0.6, 20, 0.95, 1.0),
        ),
        (
            {"text_config": {"eos_token_id": 5}},
            None,
            GenerationDefaults(None, (5,), None, False, 1.0, 50, 1.0, 1.0),
        ),
    ],
)
def test_generation_defaults(
    config: dict[str, object], generation: dict[str, object] | None, expected: GenerationDefaults
) -> None:
    assert generation_defaults(config, generation) == expected


@pytest.mark.parametrize(
    "options", [{"eos_token_id": "</s>"}, {"temperature": [1]}, {"eos_token_id": [1, None]}]
)
def test_generation_options_that_are_no_numbers(options: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="generation_config"):
        generation_defaults({}, options)
    with pytest.raises(CheckpointError, match="checkpoint's config"):
        generation_defaults(options, None)
