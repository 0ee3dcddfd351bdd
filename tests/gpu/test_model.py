"""A whole model on the GPU: its tokens, its memory, its errors."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec import runtime
from moec.errors import BudgetError, BundleError, DeviceError
from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver
from tests.gpu.conftest import GPU, Load

PROMPTS = ([11, 12, 13, 14, 15, 16, 17], [900, 5, 77], list(range(100, 140)))
NEW = 24


@pytest.fixture(scope="module")
def expected(bundle: Path) -> Any:
    """What the CPU makes of the prompts, and its logits of the longest."""
    with runtime.load(bundle, verify="sizes") as model:
        return [greedy(model, [prompt])[0] for prompt in PROMPTS], model.forward([PROMPTS[2]])[0]


def greedy(model: runtime.Model, prompts: list[list[int]]) -> list[list[int]]:
    width = max(map(len, prompts))
    rows = model.generate(prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=[])
    return [row[width:].tolist() for row in np.atleast_2d(rows)]


def used_bytes() -> int:
    driver = NvidiaDriver()
    context = driver.retain_context(0)
    try:
        driver.use_context(context)
        free, total = driver.memory_info()
        return total - free
    finally:
        driver.release_context(0)


def test_logits_are_those_of_the_cpu(load: Load, expected: Any) -> None:
    with load() as model:
        logits = model.forward([PROMPTS[2]])[0]
    reference = expected[1]
    error = np.abs(logits - reference).max() / np.abs(reference).max()
    assert error < 2e-2
    assert (logits.argmax(1) == reference.argmax(1)).mean() >= 0.95


def test_greedy_tokens_are_those_of_the_cpu(load: Load, expected: Any) -> None:
    with load() as model:
        for prompt, wanted in zip(PROMPTS, expected[0], strict=True):
            assert greedy(model, [list(prompt)])[0] == wanted


def test_a_batch_gives_each_sequence_what_it_gets_alone(load: Load, expected: Any) -> None:
    # Larger steps round the inputs of products to 16 bits, and another token may be the likeliest then.
    with load(max_batch=3, max_step_tokens=8) as model:
        assert greedy(model, [list(prompt) for prompt in PROMPTS]) == expected[0]


def test_the_same_input_twice_gives_the_same_bits(load: Load) -> None:
    with load() as model:
        first, second = (model.forward([PROMPTS[2]]) for _ in range(2))
        assert first.tobytes() == second.tobytes()
        assert greedy(model, [PROMPTS[0]]) == greedy(model, [PROMPTS[0]])


def test_a_model_works_in_whichever_thread_calls_it(load: Load, expected: Any) -> None:
    results: list[list[list[int]]] = []
    with load() as model:
        greedy(model, [PROMPTS[1]])
        thread = threading.Thread(target=lambda: results.append(greedy(model, [PROMPTS[0]])))
        thread.start()
        thread.join()
    assert results == [[expected[0][0]]]


def test_close_gives_the_memory_back(load: Load) -> None:
    load().close()
    before = used_bytes()
    for _ in range(3):
        with load(cache_tokens=512) as model:
            greedy(model, [PROMPTS[0]])
            assert used_bytes() - before <= model.memory.total_bytes
        assert used_bytes() - before < 4 << 20


def test_a_smaller_budget_takes_experts_off_and_one_too_small_says_so(load: Load) -> None:
    with load(cache_tokens=256) as model:
        needed, step_tokens = model.memory.total_bytes, model.engine.limits.max_step_tokens
    with load(cache_tokens=256, device_memory=needed) as model:
        assert model.memory.total_bytes == needed
    load().close()
    before = used_bytes()
    with load(cache_tokens=256, device_memory=needed - 1000, max_step_tokens=step_tokens) as model:
        assert model.memory.total_bytes <= needed - 1000
    with pytest.raises(BudgetError, match=r"device_memory is \d+ bytes \(.*\) too small"):
        load(cache_tokens=256, device_memory=1 << 20, max_step_tokens=step_tokens)
    with pytest.raises(BudgetError, match="are not free"):
        load(device_memory="100%")
    assert used_bytes() - before < 4 << 20


def test_a_damaged_weight_is_found_while_it_is_brought_over(bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    path = copy / "weights" / "experts-00000.bin"
    path = path if path.exists() else next(iter(sorted((copy / "weights").glob("experts-*"))))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{path.name} was changed"):
        runtime.load(copy, device=GPU)
    runtime.load(copy, device=GPU, verify="sizes").close()


def test_a_gpu_that_is_not_there_is_named(load: Load) -> None:
    with pytest.raises(DeviceError, match="no GPU cuda:63"):
        load(device="cuda:63")
