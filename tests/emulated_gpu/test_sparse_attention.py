"""Models that attend to selected positions on the emulated GPU: contexts of several times what is selected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moec import runtime
from tests.support.cuda_stub import Stub

pytestmark = pytest.mark.slow

PROMPTS = (list(range(2, 100)), [90, 5, 77], list(range(30, 80)))
NEW = 8


@pytest.mark.parametrize("name", ["deepseek_v32_selecting", "glm_moe_dsa_selecting"])
def test_tokens_are_those_of_the_cpu(name: str, bundles: Callable[[str], Path], stub: Stub) -> None:
    bundle = bundles(name)
    found = {}
    for device, more in (("cpu", {}), ("cuda:0", {"cache_tokens": 512})):
        with runtime.load(
            bundle,
            device=device,
            verify="sizes",
            max_batch=3,
            max_step_tokens=40,
            **more,  # type: ignore[arg-type]
        ) as model:
            tokens = model.generate(
                [list(prompt) for prompt in PROMPTS], max_new_tokens=NEW, do_sample=False, eos_token_id=[]
            )
            found[device] = [row[-NEW:].tolist() for row in tokens], model.forward([PROMPTS[0]])
    assert found["cpu"][0] == found["cuda:0"][0]
    expected = found["cpu"][1]
    assert np.abs(found["cuda:0"][1] - expected).max() < 1e-4 * np.abs(expected).max()
