"""Fields that transformers ignores are refused where that would change the model, and only there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.make_checkpoint import CONFIGS
from moec.compiler.tracing.model.build import build_config
from moec.compiler.tracing.model.ignored_fields import IGNORED, check_fields
from moec.errors import UnsupportedModelError
from tests.support.tiny_models import TINY


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"moe_layer_freq": 2}),
    ],
)
def test_another_model_is_refused(model_type: str, change: dict[str, object]) -> None:
    raw = TINY[model_type]().to_dict()
    build_config(raw)
    with pytest.raises(UnsupportedModelError, match="ignores"):
        build_config(raw | change)


@pytest.mark.parametrize("path", CONFIGS.values(), ids=CONFIGS)
def test_published_configs_are_taken(path: Path) -> None:
    raw = json.loads(path.read_text())
    check_fields(raw["model_type"], raw)


def test_what_transformers_reads_is_not_listed() -> None:
    for model_type, fields in IGNORED.items():
        config = build_config(TINY[model_type]().to_dict())
        source = Path(str(__import__(type(config).__module__, fromlist=["_"]).__file__)).parent
        model = next(source.glob("modeling_*.py")).read_text()
        assert [name for name in fields if f"config.{name}" in model] == []
