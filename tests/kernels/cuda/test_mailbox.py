"""The GPU's side of the mailbox, in the emulator; the CPU's side is a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.artifacts.model import ExpertBody
from moec.artifacts.words import mailbox
from moec.compiler.kernels.cpu.serve import serve
from moec.compiler.kernels.cuda.mailbox import collect, post
from moec.runtime.sharing.team import Team
from moec.runtime.tensors import aligned_empty, aligned_zeros
from tests.kernels.test_experts import SWIGLU
from tests.kernels.test_serve import Layers
from tests.support.cuda_emulator import Emulated
from tests.support.mailboxes import HostBox
from tests.support.waiting import HANG_SECONDS

TOP_K = 3
SECOND = 10**9


@cache
def emulated(hidden: int) -> Emulated:
    body = ExpertBody("b", hidden, 16, True, False, False, SWIGLU, "bfloat16")
    return Emulated(post(body), collect(body))


def aligned(values: Any, dtype: str) -> NDArray[Any]:
    array = aligned_empty(np.shape(values), dtype)
    array[...] = values
    return array


class Gpu:
    """What a layer of a step calls, on arrays."""

    def __init__(self, hidden: int) -> None:
        self.hidden, self.host = hidden, HostBox(hidden, TOP_K)
        self.sent = aligned_zeros((mailbox.SENT_WORDS,), "int64")
        self.words = self.host.box.words
        self._rng = np.random.default_rng(hidden)

    def box(self, name: str) -> NDArray[Any]:
        return self.host.array(getattr(self.host.box.layout, name))

    def post(self, index: Any, layer: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Returns x and weight."""
        tokens = len(index)
        x = aligned(self._rng.standard_normal((tokens, self.hidden)), "float32")
        weight = aligned(self._rng.random((tokens, TOP_K)), "float32")
        boxes = (self.words, *map(self.box, ("index", "weight", "x")))
        where = aligned([layer], "int64")
        emulated(self.hidden)("post_b", x, aligned(index, "int64"), weight, where, self.sent, *boxes)
        return x, weight

    def collect(self, out: NDArray[np.float32]) -> NDArray[np.float32]:
        out = aligned(out, "float32")
        emulated(self.hidden)("collect_b", out, self.sent, self.words, self.box("out"))
        return out


@pytest.mark.parametrize("hidden", [64, 2048, 37])
@pytest.mark.parametrize("tokens", [1, 8, 85])
def test_a_request_has_all_of_a_layer(hidden: int, tokens: int) -> None:
    gpu = Gpu(hidden)
    for number in (1, 2):
        index = np.full((tokens, TOP_K), -1)
        index[-1, number] = 5
        x, weight = gpu.post(index, layer=7 * number)
        assert gpu.words[mailbox.POSTED] == number
        assert gpu.sent.tolist() == [number, 1, 0, number - 1]
        assert (gpu.words[mailbox.LAYER], gpu.words[mailbox.COUNT]) == (7 * number, tokens)
        for name, expected in (("x", x), ("index", index), ("weight", weight)):
            np.testing.assert_array_equal(gpu.box(name)[: expected.size], expected.ravel())
        gpu.words[mailbox.DONE] = number


def test_a_request_waits_for_one_whose_sums_nobody_took() -> None:
    """A step that ends between the two kernels leaves one: were its number missed, its pieces would be taken twice."""
    gpu = Gpu(64)
    gpu.words[mailbox.LIMIT] = 10**7
    first, _ = gpu.post([[-1, 3, -1]])
    gpu.post([[2, -1, -1]])
    assert (gpu.words[mailbox.POSTED], gpu.words[mailbox.FAILED]) == (1, 1)
    np.testing.assert_array_equal(gpu.box("x")[: first.size], first.ravel())

    gpu = Gpu(64)
    gpu.post([[-1, 3, -1]])
    gpu.words[mailbox.DONE] = 1
    gpu.post([[2, -1, -1]])
    assert gpu.sent.tolist() == [2, 1, 0, 1]


def test_a_layer_without_a_share_makes_no_request_and_is_not_waited_for() -> None:
    gpu = Gpu(64)
    gpu.post([[-1, 3, -1]])
    gpu.words[mailbox.DONE] = 1
    gpu.box("out")[:] = 1.0
    gpu.post(np.full((2, TOP_K), -1))
    assert gpu.words[mailbox.POSTED] == 1
    assert gpu.sent[mailbox.PENDING] == 0
    out = np.ones((2, 64), np.float32)
    np.testing.assert_array_equal(gpu.collect(out), out)


@pytest.mark.parametrize(("hidden", "tokens"), [(64, 1), (37, 3), (2048, 8), (1000, 5)])
def test_sums_are_added_once_they_are_there(hidden: int, tokens: int) -> None:
    gpu = Gpu(hidden)
    gpu.post(np.zeros((tokens, TOP_K), np.int64))
    rng = np.random.default_rng(1)
    sums, out = (rng.standard_normal((tokens, hidden)).astype(np.float32) for _ in range(2))

    def answer() -> None:
        time.sleep(0.05)
        gpu.box("out")[: sums.size] = sums.ravel()
        gpu.words[mailbox.DONE] = 1

    gpu.box("out")[:] = np.nan
    thread = threading.Thread(target=answer)
    thread.start()
    result = gpu.collect(out)
    thread.join()
    np.testing.assert_array_equal(result, out + sums)
    assert gpu.words[mailbox.FAILED] == 0


@pytest.mark.parametrize("how", ["abort", "time"])
def test_nobody_is_waited_for_for_ever(how: str) -> None:
    gpu = Gpu(2048)
    gpu.post(np.zeros((3, TOP_K), np.int64))
    out, start = np.ones((3, 2048), np.float32), time.monotonic()
    if how == "time":
        gpu.words[mailbox.LIMIT] = SECOND // 20
    else:
        threading.Timer(0.05, gpu.host.box.abort).start()
    np.testing.assert_array_equal(gpu.collect(out), out)
    assert 0.05 <= time.monotonic() - start < HANG_SECONDS
    assert gpu.host.box.failed_request == 1
    gpu.post(np.zeros((3, TOP_K), np.int64))
    assert gpu.words[mailbox.POSTED] == 1
    gpu.words[mailbox.LIMIT], start = 2 * HANG_SECONDS * SECOND, time.monotonic()
    gpu.collect(out)
    assert time.monotonic() - start < HANG_SECONDS, "it waits again"


def test_both_sides_together(compiled: Callable[[Any, int], Callable[..., None]]) -> None:
    body = ExpertBody("b", 64, 48, True, False, False, SWIGLU, "bfloat16")
    layers, gpu = Layers([body]), Gpu(64)
    team = Team(compiled(serve([body], lanes=8, machine="x86_64"), 8), gpu.host.box, layers.shared, 1)
    try:
        team.begin()
        for tokens in (1, 4, 8):
            index = np.random.default_rng(tokens).integers(-1, 7, (tokens, TOP_K))
            index[0, 0] = 2
            x, weight = gpu.post(index)
            out = np.ones((tokens, 64), np.float32)
            expected = 1 + layers.expected(0, x, index, weight)
            np.testing.assert_allclose(gpu.collect(out), expected, rtol=2e-5, atol=2e-6)
        team.end()
        team.check()
    finally:
        team.close()
