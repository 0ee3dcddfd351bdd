"""The states of sequences: their memory, budgets that count them, and records that must fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from moec.artifacts.files.checks import model_problems
from moec.artifacts.ids import LayerId, TensorName, ValueId
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.model import ModelRecord, TensorSpec
from moec.artifacts.sizes import human_bytes
from moec.artifacts.states import ConvolutionSpec, RecurrenceSpec, state_bytes
from moec.artifacts.steps import StateStep
from moec.errors import BudgetError
from moec.runtime.cache.states import StateStorage
from moec.runtime.devices.cpu import CpuDevice
from moec.runtime.memory.budget import plan_memory
from tests.support import fake_chain

CONVOLUTION = ConvolutionSpec("convolution", "c", fake_chain.HIDDEN, 4, False)
RECURRENCE = RecurrenceSpec("recurrence", "r", 1, 2, 3, 5, "head", True)


def with_state(**changes: Any) -> ModelRecord:
    """The fake chain with a convolution of its first segment's input in front."""
    record = fake_chain.record()
    value, result = ValueId("x_in"), ValueId("x_out")
    step = StateStep("state", "c", LayerId(0), (value,), (TensorName("taps"),), result)
    shape = TensorSpec("float32", (1, "T", fake_chain.HIDDEN))
    first = dataclasses.replace(record.steps[0])
    assert first.kind == "segment"
    made = dataclasses.replace(first, outputs=(*first.outputs, value))
    function = next(spec for spec in record.functions if spec.name == first.function)
    functions = tuple(
        dataclasses.replace(spec, outputs=(*spec.outputs, shape)) if spec is function else spec
        for spec in record.functions
    )
    return dataclasses.replace(
        record,
        states=(CONVOLUTION,),
        values={**record.values, value: shape, result: shape},
        functions=functions,
        steps=(made, dataclasses.replace(step, **changes), *record.steps[1:]),
        last_step=record.last_step + 1,
    )


def test_each_layer_has_a_state_for_each_row() -> None:
    storage = StateStorage(CpuDevice(), (CONVOLUTION, RECURRENCE, CONVOLUTION), 3)
    shapes = [tuple(storage.layer(number).shape) for number in range(3)]
    assert shapes == [(4, 3, fake_chain.HIDDEN), (4, 2, 3, 5), (4, 3, fake_chain.HIDDEN)]
    tensors = [np.from_dlpack(storage.layer(number)) for number in range(3)]
    for number, tensor in enumerate(tensors):
        tensor[...] = number
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))


def test_states_are_part_of_the_footprint_and_of_the_budget() -> None:
    plain, facts = footprint(fake_chain.record()), footprint(with_state())
    assert facts.sequence_bytes == state_bytes(CONVOLUTION)
    assert facts.states_bytes(7) == 8 * state_bytes(CONVOLUTION)
    assert plain.states_bytes(7) == 0
    options: dict[str, Any] = {
        "max_context": 256,
        "available_bytes": 1 << 30,
        "cache_tokens": 64,
        "max_batch": 7,
        "max_step_tokens": 16,
    }
    memory = plan_memory(facts, host_memory=None, **options)
    assert memory.state_bytes == facts.states_bytes(7)
    least = memory.total_bytes - facts.experts_bytes + facts.working_set_bytes
    assert plan_memory(facts, host_memory=least, **options).total_bytes == least
    with pytest.raises(BudgetError, match="1 bytes too small") as caught:
        plan_memory(facts, host_memory=least - 1, **options)
    assert f"states of sequences {human_bytes(memory.state_bytes)}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"state": "other"}, "unknown state other"),
        ({"weights": ()}, "operands of the state c"),
        ({"inputs": (ValueId("tokens"),), "output": ValueId("logits")}, "another shape"),
    ],
)
def test_steps_must_fit_their_state(changes: dict[str, Any], problem: str | None) -> None:
    problems = list(model_problems(with_state(**changes)))
    if problem is None:
        assert problems == []
    else:
        assert any(problem in each for each in problems)
