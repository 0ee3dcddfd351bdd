"""Attention to selected positions, a part of the context, against transformers eager in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.errors import UnsupportedModelError
from tests.end_to_end import test_models
from tests.end_to_end.conftest import BundleMaker
from tests.support.compiling import compile_checkpoint
from tests.support.tiny_models import save
from tests.support.tiny_models.sparse_attention import SELECTING


@pytest.mark.slow
@pytest.mark.parametrize("name", SELECTING)
def test_matches_transformers(name: str, make_bundle: BundleMaker) -> None:
    test_models.test_matches_transformers(name, make_bundle)


def test_a_gpu_has_no_kernels_for_it(tmp_path: Path) -> None:
    checkpoint = save("deepseek_v32_selecting", tmp_path / "checkpoint")
    with pytest.raises(UnsupportedModelError, match="attends to 24 positions of a context of 256"):
        compile_checkpoint(checkpoint, tmp_path / "out", targets=("cuda-sm_90",), modules_only=True)
    assert not (tmp_path / "out").exists()
