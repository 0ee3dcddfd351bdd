"""Steps for kernels of states, with what they must come to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moec.artifacts.states import (
    ConvolutionSpec,
    RecurrenceSpec,
    StateSpec,
    state_inputs,
    state_output,
    state_shape,
    state_weights,
)
from moec.compiler.kernels.reference import advance
from moec.runtime.tensors import aligned_zeros

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

ROWS = 5
TOLERANCE = 3e-6
"""Relative to the largest number."""

SPECS: dict[str, StateSpec] = {
    "convolution": ConvolutionSpec("convolution", "c", 96, 4, True),
    "odd convolution": ConvolutionSpec("convolution", "c", 37, 3, False),
    "gated delta rule": RecurrenceSpec("recurrence", "r", 2, 6, 24, 40, "head", True),
    "delta attention": RecurrenceSpec("recurrence", "r", 3, 3, 32, 32, "channel", True),
    "mamba 2": RecurrenceSpec("recurrence", "r", 1, 4, 16, 12, "head", False),
    "mamba": RecurrenceSpec("recurrence", "r", 1, 1, 16, 80, "rates", False),
    "lightning attention": RecurrenceSpec("recurrence", "r", 4, 4, 20, 20, "fixed", False),
}
"""One of each form that models have."""

STEPS: list[list[tuple[int, int]]] = [
    [(0, 9)],
    [(0, 1), (3, 2)],
    [(3, 11), (1, 1), (0, 3)],
    [(0, 1), (1, 1), (3, 1)],
    [(1, 2), (0, 1)],
]
"""(row, new tokens) of each step; before the last one row 1 is given to another sequence."""


class StepRunner:
    """Runs `STEPS` on random numbers, beside the reference; states are garbage to begin with.

    Args:
        spec: which state.
        seed: of the numbers.
    """

    def __init__(self, spec: StateSpec, seed: int = 0) -> None:
        self.spec = spec
        self._random = np.random.default_rng(seed)
        self.state = self._normal(ROWS, *state_shape(spec))
        self.state *= 1e3
        self.weights = tuple(self._weight(number) for number in range(len(state_weights(spec))))
        self._expected = self.state.astype(np.float64)
        self._length = [0] * ROWS

    def check(self, kernel: Callable[..., None]) -> None:
        """Call ``kernel(*arguments)`` for every step and compare results and states."""
        for number, step in enumerate(STEPS):
            if number == len(STEPS) - 1:
                self._length[1] = 0
            rows = [row for row, count in step for _ in range(count)]
            inputs = self._inputs(len(rows))
            out = self._normal(*self._shape(state_output(self.spec), len(rows)))
            positions: list[int] = []
            expected = np.zeros(out.shape)
            for token, row in enumerate(rows):
                positions.append(self._length[row])
                own = [each[0, token].astype(np.float64) for each in inputs]
                wide = [weight.astype(np.float64) for weight in self.weights]
                self._expected[row], expected[0, token] = advance(
                    self.spec, self._expected[row], self._length[row], own, wide
                )
                self._length[row] += 1
            where = (aligned(np.array(each, np.int32)) for each in (rows, positions))
            kernel(*map(aligned, inputs), self.state, *where, *self.weights, out)
            assert_close(out, expected)
            assert_close(self.state, self._expected)

    def _inputs(self, tokens: int) -> list[NDArray[np.float32]]:
        found = [self._normal(*self._shape(shape, tokens)) for shape in state_inputs(self.spec)]
        if isinstance(self.spec, RecurrenceSpec):
            size = np.float32(self.spec.key_dim**-0.5)
            found[0], found[1] = found[0] * size, found[1] * size
            if self.spec.delta:
                found[-1] = (1 / (1 + np.exp(-found[-1]))).astype(np.float32)
            if self.spec.decay != "fixed":  # steps are positive, logarithms of a decay are not
                found[3] = np.abs(found[3]) * np.float32(1 if self.spec.decay == "rates" else -1)
        return found

    def _weight(self, number: int) -> NDArray[np.float32]:
        value = self._normal(*state_weights(self.spec)[number])
        return value if isinstance(self.spec, ConvolutionSpec) else aligned(-np.abs(value))

    def _normal(self, *shape: int) -> NDArray[np.float32]:
        return aligned(self._random.standard_normal(shape).astype(np.float32))

    def _shape(self, shape: tuple[Any, ...], tokens: int) -> tuple[int, ...]:
        return tuple(tokens if extent == "T" else extent for extent in shape)


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy as kernels take it."""
    copy = aligned_zeros(array.shape, array.dtype.type)
    copy[...] = array
    return copy


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float64]) -> None:
    """Within `TOLERANCE` of the largest number."""
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def torch_arguments(*arrays: NDArray[Any]) -> list[torch.Tensor]:
    """The arrays as tensors over the same memory, which TVM takes."""
    return [torch.from_numpy(array) for array in arrays]
