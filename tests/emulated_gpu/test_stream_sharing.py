"""Steps of many tokens of which the CPU computes some missing experts, on the emulated GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moec import runtime
from moec.artifacts.files.reader import open_bundle
from moec.artifacts.layout.footprint import LOGIT_ROWS
from moec.errors import DeviceError
from moec.runtime.devices.cuda.offload import helping, layer_share, stream_share
from moec.runtime.devices.cuda.offload.helping import device_bytes, host_bytes
from moec.runtime.devices.cuda.offload.layer_share import HostRows
from moec.runtime.devices.cuda.offload.stream_share import StreamShare
from tests.support.cuda_stub import Stub
from tests.support.emulated_models import CACHE, compiled, nothing_left, planned
from tests.support.emulated_offload import LONG, budget, host_budget, slots_of

pytestmark = pytest.mark.slow
STEP = 160
OPTIONS: dict[str, Any] = {
    "device": "cuda:0",
    "verify": "sizes",
    "cache_tokens": CACHE,
    "max_batch": 1,
    "max_step_tokens": STEP,
}
PROMPT = LONG[:LOGIT_ROWS]
"""One step, all of whose layers are streamed."""
ALIKE = [7] * LOGIT_ROWS
"""Some experts have none of its tokens."""
Load = Callable[..., runtime.Model]


@pytest.fixture(scope="module")
def bundle(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("model"), "f32", torch.float32)


@pytest.fixture(scope="module")
def expected(bundle: Path, stub: Stub) -> dict[str, Any]:
    with runtime.load(bundle, **OPTIONS) as model:
        return {"plan": planned(model), "long": score(model, PROMPT), "alike": score(model, ALIKE)}


@pytest.fixture
def load(
    bundle: Path, stub: Stub, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Load]:
    def load_it(share: float, by_cpu: float = 0.5, **options: Any) -> runtime.Model:
        """The CPU has so much of what is missing, of few tokens too."""
        shares = [math.ceil(by_cpu * misses) for misses in range(64)]
        monkeypatch.setattr(helping, "cpu_shares", lambda _, most: tuple(shares[: most + 1]))
        monkeypatch.setattr(layer_share, "cpu_share_of_many", lambda _, tokens: shares[len(tokens)])
        monkeypatch.setattr(StreamShare, "takes", lambda own, layer, tokens: tokens <= own._most)
        memory = budget(expected, share, bundle) + device_bytes(open_bundle(bundle).model, STEP)
        return runtime.load(bundle, **{**OPTIONS, "cpu_threads": 1, "device_memory": memory, **options})

    yield load_it
    nothing_left(stub)


def score(model: runtime.Model, tokens: list[int]) -> NDArray[np.float32]:
    return model.engine.score(tuple(tokens)).copy()


def agree(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def moved(model: runtime.Model) -> int:
    """Bytes of the misses that are not the CPU's; all layers' experts are of one size."""
    (stride,) = {layer.stride_bytes for layer in slots_of(model).layers}
    return (model.stats.misses - model.stats.cpu_misses) * stride


@pytest.mark.parametrize(
    ("share", "by_cpu", "lead"), [(0.3, 0.5, 0.0), (0.3, 0.5, 0.3), (0.0, 1.0, 0.0), (0.0, 0.2, 0.2)]
)
def test_prompts_agree_with_the_resident_run(
    load: Load,
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    by_cpu: float,
    lead: float,
) -> None:
    monkeypatch.setattr(stream_share, "MOST_LEAD", lead)
    monkeypatch.setattr(stream_share, "LEAD_US", 1e9)
    with load(share, by_cpu) as model:
        model.stats.reset()
        first = score(model, PROMPT)
        agree(first, expected["long"])
        stats = model.stats
        assert 0.8 * by_cpu * (1 - lead) * stats.misses < stats.cpu_misses <= stats.misses
        assert (stats.cpu_misses == stats.misses) == (by_cpu == 1.0)
        assert stats.bytes_moved == moved(model)
        agree(score(model, ALIKE), expected["alike"])
        assert score(model, PROMPT).tobytes() == first.tobytes()
        assert model.stats.bytes_moved == moved(model)


def test_experts_in_the_file_are_the_gpus(load: Load, expected: dict[str, Any], bundle: Path) -> None:
    host = host_budget(expected, 0.6, bundle) + host_bytes(open_bundle(bundle).model, STEP)
    with load(0.5, 1.0, host_memory=host) as model:
        assert all(layer.hosted < layer.experts for layer in slots_of(model).layers)
        model.stats.reset()
        agree(score(model, PROMPT), expected["long"])
        assert 0 < model.stats.cpu_misses < model.stats.misses
        assert model.stats.bytes_moved == moved(model)


@pytest.mark.parametrize("threads", [0, 1])
def test_without_a_share_the_bits_are_those_of_the_resident_run(
    load: Load, expected: dict[str, Any], threads: int
) -> None:
    with load(0.3, 0.0, cpu_threads=threads) as model:
        assert score(model, PROMPT).tobytes() == expected["long"].tobytes()
        assert model.stats.misses > model.stats.cpu_misses == 0


@pytest.mark.parametrize(
    ("raised", "found", "message"),
    [
        (KeyboardInterrupt, KeyboardInterrupt, "bad"),
        (RuntimeError, DeviceError, "did not compute its experts"),
    ],
)
def test_a_prompt_that_ends_in_its_middle_leaves_nothing_behind(
    load: Load,
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    raised: type[BaseException],
    found: type[BaseException],
    message: str,
) -> None:
    with load(0.3) as model:
        with monkeypatch.context() as patch:
            patch.setattr(HostRows, "compute", _raise(raised))
            with pytest.raises(found, match=message):
                score(model, PROMPT)
        agree(score(model, PROMPT), expected["long"])


def _raise(error: type[BaseException]) -> Callable[[HostRows], None]:
    """The second layer's call fails."""
    compute, left = HostRows.compute, [1]

    def run(rows: HostRows) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error("bad")
        compute(rows)

    return run


def test_steps_beyond_what_the_cpu_has_room_for_are_streamed_alone(
    load: Load, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_share, "MOST_SHARED_TOKENS", 16)
    with load(0.3, 0.0) as model:
        monkeypatch.setattr(layer_share, "cpu_share_of_many", lambda _, tokens: len(tokens))
        assert score(model, PROMPT).tobytes() == expected["long"].tobytes()
        assert model.stats.cpu_misses == 0
