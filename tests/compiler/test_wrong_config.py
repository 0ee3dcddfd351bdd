"""A config.json that is wrong against its tensors is an error that names them, before any byte is written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from moec.errors import CheckpointError
from tests.support.compiling import compile_checkpoint
from tests.support.tiny_models import save

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("mixtral", tmp_path_factory.mktemp("wrong") / "model")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 1}, r"unexpected .*model\.layers\.1\."),
    ({"num_local_experts": 6}, r"missing .*layers\.0\.block_sparse_moe\.experts\.5\.w1"),
    ({"num_local_experts": 4}, r"experts\.4\.w\d\.weight"),
    ({"num_hidden_layers": 3}, r"missing .*model\.layers\.2\."),
    ({"intermediate_size": 88}, r"experts\.0\.w\d\.weight has the wrong shape: \[.*80.*88"),
    ({"num_key_value_heads": 2}, r"k_proj\.weight has the wrong shape"),
    ({"vocab_size": 130}, r"(embed_tokens|lm_head)\.weight has the wrong shape: \[131, 64\].*\[130, 64\]"),
    ({"hidden_size": 96}, "has the wrong shape"),
    ({"head_dim": 16}, r"[qko]_proj\.weight has the wrong shape"),
    ({"num_attention_heads": "eight"}, "The config does not describe a mixtral model"),
]
"""What is changed, and what the error says; the first is a canary."""


@pytest.mark.parametrize(
    ("change", "named"), [WRONG[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in WRONG[1:])]
)
def test_is_found_before_anything_is_written(
    change: dict[str, Any], named: str, checkpoint: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "model"
    wrong.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | change))
    (wrong / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        compile_checkpoint(wrong, tmp_path / "out.moec")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
