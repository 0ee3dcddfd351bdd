"""Attention to selected positions, a part of the context, against transformers eager in float32."""

from __future__ import annotations

import pytest

from tests.end_to_end import test_models
from tests.end_to_end.conftest import BundleMaker
from tests.support.tiny_models.sparse_attention import SELECTING


@pytest.mark.slow
@pytest.mark.parametrize("name", SELECTING)
def test_matches_transformers(name: str, make_bundle: BundleMaker) -> None:
    test_models.test_matches_transformers(name, make_bundle)
