"""Kernels of states: decoding reads and writes a state for each token, a prompt goes through it token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.kernels.cases import EXACT, Case, Judgement, relative_error
from benchmarks.support.torch_clock import side_stream
from moec.artifacts.states import (
    STATE_PREFIX,
    ConvolutionSpec,
    RecurrenceSpec,
    StateSpec,
    state_inputs,
    state_output,
    state_shape,
    state_weights,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.kernels.module import Module

STEPS = ((1, 1), (8, 1), (1, 512), (1, 2048), (8, 256))
"""Sequences, and new tokens of each."""
ROTATED_BYTES = 1 << 29
MOST_CALLS = 64
POSITION = 100
"""Of the first token: the states are there."""


@dataclass(frozen=True, eq=False)
class StateStep:
    """The operands of one call."""

    spec: StateSpec
    inputs: tuple[torch.Tensor, ...]
    state: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    weights: tuple[torch.Tensor, ...]
    out: torch.Tensor

    def operands(self) -> tuple[torch.Tensor, ...]:
        """In the order of the kernel's arguments."""
        return (*self.inputs, self.state, self.sequence, self.position, *self.weights, self.out)

    def expected(self, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Result and state after the step, in float64, token by token."""
        states, out = before.double(), torch.empty(self.out.shape, dtype=torch.float64, device=before.device)
        inputs = [each[0].double() for each in self.inputs]
        weights = [each.double() for each in self.weights]
        rows = states.shape[0]
        tokens = self.sequence.numel() // rows
        for number in range(tokens):  # of every sequence at once
            own = torch.arange(rows, device=before.device) * tokens + number
            states, out[0, own] = _advance(self.spec, states, [each[own] for each in inputs], weights)
        return out, states


def state_cases(
    module: Module,
    steps: tuple[tuple[int, int], ...] = STEPS,
    rotated_bytes: int = ROTATED_BYTES,
) -> Iterator[Callable[[], Case]]:
    """What makes each case; the memory is taken when one is made."""
    for spec in module.model.states:
        for sequences, new in steps:
            yield partial(_case, module, spec, sequences, new, rotated_bytes)


def make_state_step(spec: StateSpec, sequences: int, new: int, device: torch.device) -> StateStep:
    """``new`` tokens of each sequence, which go on where random states are."""
    tokens = sequences * new
    inputs = [_random(shape, tokens, device) for shape in state_inputs(spec)]
    weights = [_random(shape, tokens, device) for shape in state_weights(spec)]
    if isinstance(spec, RecurrenceSpec):
        for each in inputs[:2]:
            each.mul_(spec.key_dim**-0.5)
        if spec.delta:
            inputs[-1].sigmoid_()
        if spec.decay != "fixed":  # steps are positive, logarithms of a decay are not
            inputs[3].abs_().mul_(1 if spec.decay == "rates" else -1)
        weights = [each.abs_().neg_() for each in weights]
    return StateStep(
        spec,
        tuple(inputs),
        torch.randn(sequences, *state_shape(spec), device=device),
        torch.arange(sequences, device=device).repeat_interleave(new).int(),
        torch.arange(POSITION, POSITION + new, device=device).repeat(sequences).int(),
        tuple(weights),
        torch.empty(_shape(state_output(spec), tokens), device=device),
    )


def _case(module: Module, spec: StateSpec, sequences: int, new: int, rotated_bytes: int) -> Case:
    first = make_state_step(spec, sequences, new, module.device)
    moved = 4 * (2 * first.state.numel() + sum(each.numel() for each in (*first.inputs, first.out)))
    count = max(1, min(MOST_CALLS, rotated_bytes // moved))
    others = (make_state_step(spec, sequences, new, module.device) for _ in range(count - 1))
    steps = (first, *others)
    name, tokens = f"{STATE_PREFIX}{spec.name}", sequences * new
    calls = [module.bind(name, *step.operands(), tokens=tokens) for step in steps]
    return Case(
        describe(spec),
        f"{sequences} x {new}",
        calls,
        lambda: _judge(calls[0], first),
        EXACT,
        moved,
        tokens * _operations(spec),
        "copy",
        None,
    )


def _operations(spec: StateSpec) -> int:
    """Of one token."""
    if isinstance(spec, ConvolutionSpec):
        return 2 * spec.channels * spec.width
    return (7 if spec.delta else 5) * math.prod(state_shape(spec))


def _judge(call: Callable[[], None], step: StateStep) -> Judgement:
    """Run twice from the same state; the worse of result and state."""
    before = step.state.clone()
    expected, after = step.expected(before)
    found = []
    for _ in range(2):
        step.state.copy_(before)
        step.out.fill_(float("nan"))
        with side_stream(step.out.device):
            call()
        found.append((step.out.clone(), step.state.clone()))
    (out, state), again = found
    error = max(relative_error(out, expected), relative_error(state, after))
    return Judgement(error, torch.equal(out, again[0]) and torch.equal(state, again[1]))


def _advance(
    spec: StateSpec, states: torch.Tensor, inputs: list[torch.Tensor], weights: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(spec, ConvolutionSpec):
        window = torch.cat([states, inputs[0][:, None]], 1)
        return window[:, 1:], (window * weights[0]).sum(1) + (weights[1] if spec.bias else 0)
    group = spec.value_heads // spec.key_heads
    query, key = (each.repeat_interleave(group, 1) for each in inputs[:2])
    value, rest = inputs[2], inputs[3:]
    decay = {
        "head": lambda: rest[0][:, :, None, None],
        "channel": lambda: rest[0][..., None],
        "rates": lambda: rest[0][:, :, None] * weights[0],
        "fixed": lambda: weights[0][:, None, None],
    }[spec.decay]()
    states = states * decay.exp()
    if spec.delta:
        value = rest[-1][..., None] * (value - torch.einsum("bhkv,bhk->bhv", states, key))
    states = states + key[..., None] * value[:, :, None]
    return states, torch.einsum("bhkv,bhk->bhv", states, query)


def _random(shape: tuple[Any, ...], tokens: int, device: torch.device) -> torch.Tensor:
    return torch.randn(_shape(shape, tokens), device=device)


def _shape(shape: tuple[Any, ...], tokens: int) -> tuple[int, ...]:
    return tuple(tokens if extent == "T" else extent for extent in shape)


def describe(spec: StateSpec) -> str:
    """For the table."""
    if isinstance(spec, ConvolutionSpec):
        return f"convolution {spec.channels} channels, {spec.width} wide"
    heads = f"{spec.value_heads} ({spec.key_heads}) heads"
    return f"recurrence {heads}, {spec.key_dim} x {spec.value_dim}, {spec.decay}{', delta' * spec.delta}"
