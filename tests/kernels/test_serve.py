"""The CPU's serving loop alone: a test plays the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moec.artifacts.model import ExpertBody
from moec.compiler.kernels import reference
from moec.compiler.kernels.cpu.serve import serve
from moec.runtime.sharing import team as teams
from moec.runtime.sharing.team import SharedLayer, Team
from moec.runtime.tensors import aligned_empty
from tests.kernels.test_experts import CLAMPED, SWIGLU, Parts, _pool, tolerance
from tests.support.mailboxes import HostBox

Compile = Callable[[Any, int], Callable[..., None]]
EXPERTS, TOP_K = 7, 3

GATED = ExpertBody("gated", 64, 33, True, True, True, CLAMPED, "float16")
PLAIN = ExpertBody("plain", 64, 20, False, False, True, ("gelu", "up"), "float32")
ODD = ExpertBody("odd", 37, 70, True, False, False, SWIGLU, "bfloat16")
INT4 = ExpertBody("int4", 64, 75, True, True, True, CLAMPED, "float16", "int4-g32")
MXFP4 = ExpertBody("mxfp4", 64, 40, False, False, False, ("gelu", "up"), "bfloat16", "mxfp4")


class Layers:
    """Random experts, one MoE layer for each of ``bodies``."""

    def __init__(self, bodies: list[ExpertBody]) -> None:
        generator = torch.Generator().manual_seed(3)
        self.bodies = bodies
        self.parts: list[Parts] = []
        self._held: list[Any] = []
        self.shared: list[SharedLayer] = []
        for number, body in enumerate(bodies):
            memory, parts, addresses = _pool(body, EXPERTS, generator)
            table = aligned_empty((EXPERTS,), np.int64)
            table[:] = addresses.numpy()
            self._held.append((memory, table))
            self.parts.append(parts)
            self.shared.append(SharedLayer(table.ctypes.data, EXPERTS, TOP_K, number, body.intermediate))

    def expected(self, layer: int, x: Any, index: Any, weight: Any) -> NDArray[np.float64]:
        return reference.experts(
            self.bodies[layer], self.parts[layer], x.astype(np.float64), index, weight.astype(np.float64)
        )


@contextmanager
def serving(kernel: Callable[..., None], layers: Layers, threads: int) -> Iterator[HostBox]:
    box = HostBox(layers.bodies[0].hidden, TOP_K)
    team = Team(kernel, box.box, layers.shared, threads)
    try:
        team.begin()
        yield box
        team.end()
        team.check()
    finally:
        team.close()


def random_request(
    rng: np.random.Generator, tokens: int, hidden: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    index = rng.integers(-1, EXPERTS + 1, (tokens, TOP_K))
    return x, index, rng.random((tokens, TOP_K)).astype(np.float32)


@pytest.mark.parametrize(
    ("lanes", "bodies"),
    [
        (16, [ODD]),
        (8, [GATED, PLAIN]),
        (4, [GATED, PLAIN]),
        pytest.param(16, [INT4, MXFP4], marks=pytest.mark.slow),
    ],
)
def test_requests_are_answered_as_the_reference_says(
    compiled: Compile, lanes: int, bodies: list[ExpertBody]
) -> None:
    kernel = compiled(serve(bodies, lanes=lanes, machine="x86_64"), lanes)
    layers, rng = Layers(bodies), np.random.default_rng(lanes)
    with serving(kernel, layers, 2) as box:
        for number in range(24):
            layer, tokens = number % len(bodies), (1, 2, 3, 5, 8, 13, 40, 85)[number % 8]
            request = random_request(rng, tokens, bodies[0].hidden)
            if number % 5 == 0:
                request[1][:] = 2  # all tokens choose one expert, all their choices
            box.post(layer, *request)
            expected = layers.expected(layer, *request)
            error = np.abs(box.collect(tokens) - expected).max() / max(1e-9, np.abs(expected).max())
            assert error < tolerance(bodies[layer], lanes), (number, layer, tokens)


def test_a_request_without_experts_gives_zeros(compiled: Compile) -> None:
    kernel = compiled(serve([ODD], lanes=8, machine="x86_64"), 8)
    with serving(kernel, Layers([ODD]), 2) as box:
        x = np.ones((2, ODD.hidden), np.float32)
        index = np.array([[-1, EXPERTS, 1 << 40], [-(1 << 62), -1, -1]])
        box.post(0, x, index, np.ones((2, TOP_K), np.float32))
        assert (box.collect(2) == 0).all()


@pytest.mark.parametrize("body", [GATED, INT4], ids=["float16", "int4"])
def test_any_number_of_threads_and_pieces_gives_the_same_bits(
    compiled: Compile, monkeypatch: pytest.MonkeyPatch, body: ExpertBody
) -> None:
    kernel = compiled(serve([body], lanes=8, machine="x86_64"), 8)
    layers, request = Layers([body]), random_request(np.random.default_rng(5), 8, body.hidden)
    results = []
    for threads, pieces in ((1, 1), (3, 1), (2, 5), (4, 40)):
        monkeypatch.setattr(teams, "CHUNKS_PER_THREAD", pieces)
        with serving(kernel, layers, threads) as box:
            for _ in range(3):
                box.post(0, *request)
                results.append(box.collect(8))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
