"""Routed experts and the shared expert in front of them in one function: the same as one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.artifacts.layout.experts import layout
from moec.artifacts.program import cached_beside_name
from moec.artifacts.schedule import DEFAULT_POLICY
from moec.artifacts.steps import SegmentStep
from moec.artifacts.words import slots as words
from moec.compiler.kernels.cuda.experts.beside import MOST_TOKENS
from moec.compiler.kernels.cuda.experts.kernel import experts, workspace_bytes
from moec.compiler.kernels.cuda.slots.assign import assign
from moec.compiler.kernels.cuda.slots.fetch import fetch
from moec.compiler.lowering.kernel_library import CudaKernels, side_segments
from moec.compiler.lowering.lower import import_segments, packed_functions
from moec.compiler.lowering.pipeline import pipeline, run_passes
from moec.compiler.lowering.program import read_segment
from moec.compiler.lowering.targets import parse_target
from moec.runtime.devices.cuda.offload.states import Places, fill_state
from moec.runtime.experts.slots import LayerSlots
from moec.runtime.tensors import aligned_empty
from tests.support.canaries import most_slow
from tests.support.cuda_emulator import Emulated
from tests.support.graphs import parts
from tests.support.tiny_models import TINY

TOLERANCE = 3e-6
"""Of a shared expert's result, relative to the largest: beside others its sums may be cut in other ways."""
TYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": np.uint16, "int64": np.int64}


def filled(shape: tuple[int, ...], dtype: str, random: np.random.Generator) -> NDArray[Any]:
    array = aligned_empty(shape, TYPES[dtype])
    values = (random.standard_normal(shape) * 0.3).astype(np.float32)
    array[...] = values.view(np.uint32) >> 16 if dtype == "bfloat16" else values
    return array


class Setting:
    """A model's experts with the segment in front of them, and the functions that run them."""

    def __init__(self, name: str) -> None:
        partitioned = parts(name, "bfloat16")
        self.model = partitioned.model
        products: dict[str, Any] = {}
        module = run_passes(
            import_segments(partitioned.functions, self.model),
            pipeline(parse_target("cuda-sm_80"), products),
            None,
        )
        segments = [
            read_segment(spec.name, module[spec.name], len(spec.inputs), self.model.class_name)
            for spec in self.model.functions
        ]
        body, segment = next(side_segments(self.model))
        self.body = next(each for each in self.model.bodies if each.name == body)
        self.segment = next(each for each in segments if each.name == segment)
        self.spec = next(spec for spec in self.model.functions if spec.name == segment)
        self.made = list(CudaKernels().beside(self.model, segments, products))
        if not self.made:
            return
        self.record, together = self.made[0]
        loops = packed_functions(module, [self.segment], {})
        self.top_k = max(layer.top_k for layer in self.model.experts)
        self.run = Emulated(
            *(function for _, function in loops.functions_items()),
            experts(self.body, self.top_k).with_attr("global_symbol", f"experts_{self.body.name}"),
            *(function.with_attr("global_symbol", name) for name, function in together.items()),
            assign(),
            fetch(blocks=3),
        )


def fetched(
    setting: Setting, host: NDArray[np.uint8], index: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Slots for the experts in ``host [E, bytes]``, two of them filled before the step, and the layer's state."""
    count, stride = host.shape
    slots = aligned_empty((count, stride), np.uint8)
    slots[...] = 0
    slots[:2] = host[:2]
    body = setting.body
    order, second = tuple(range(count)), layout(body).part("down").offset_bytes
    filled_slots = LayerSlots(count, setting.top_k, stride, second, 2, count, order, (0.0,) * count, ())
    homes = host.ctypes.data + stride * np.arange(count)
    state = aligned_empty((words.state_words(count, count).size,), np.int64)
    state[...] = 0
    fill_state(state, filled_slots, DEFAULT_POLICY, Places(slots.ctypes.data, 0, 0, homes))
    # The others are free.
    state[words.SLOTS] = count
    own = [aligned_empty(index.shape, np.int64) for _ in range(2)]
    setting.run(words.ASSIGN, index, state, *own)
    setting.run(words.FETCH, state)
    return slots, state


def size(shape: tuple[int | str, ...], tokens: int) -> tuple[int, ...]:
    return tuple(
        extent if isinstance(extent, int) else int(extent.removesuffix("T") or 1) * tokens for extent in shape
    )


@pytest.mark.parametrize("name", most_slow(sorted(TINY)))
def test_one_function_for_both_makes_what_two_make(name: str) -> None:
    if not list(side_segments(parts(name, "bfloat16").model)):
        pytest.skip("this model has no segment beside its experts")
    setting = Setting(name)
    if not setting.made:
        alone = [call.function.startswith("linear") for call in setting.segment.calls]
        assert not all(alone), "a shared expert of nothing but products has such a function"
        return
    assert (setting.record.body, setting.record.segment) == (setting.body.name, setting.segment.name)
    assert any(isinstance(step, SegmentStep) and step.side for step in setting.model.steps)
    for tokens in (1, MOST_TOKENS):
        apart, *others = (results(setting, tokens, how) for how in ("apart", "together", "arriving"))
        for together in others:
            assert np.array_equal(apart[0], together[0])
            for expected, actual in zip(apart, together, strict=True):
                scale = np.abs(expected).max()
                assert scale > 0
                assert np.abs(expected - actual).max() <= TOLERANCE * scale
        for arriving, together in zip(*others, strict=True):
            assert np.array_equal(arriving, together)


def results(setting: Setting, tokens: int, how: str) -> list[NDArray[Any]]:
    """The experts' result and the segment's outputs; ``arriving``: three of five experts are fetched."""
    random, body, count = np.random.default_rng(tokens), setting.body, 5
    stride = layout(body).stride_bytes
    weights = filled((count, stride // 2), "bfloat16", random)
    table = aligned_empty((count,), np.int64)
    table[...] = weights.ctypes.data + np.arange(count) * stride
    x = filled((tokens, body.hidden), "float32", random)
    index = aligned_empty((tokens, setting.top_k), np.int64)
    index[...] = random.integers(0, count, index.shape)
    chosen = filled(index.shape, "float32", random)
    fixed, each = workspace_bytes(body, setting.top_k, count)
    own = [x, index, chosen, table, aligned_empty((fixed + each * tokens,), np.uint8)]
    out = aligned_empty(x.shape, np.float32)
    pools: dict[str, list[NDArray[Any]]] = {
        "input": [filled(size(spec.shape, tokens), spec.dtype, random) for spec in setting.spec.inputs],
        "weight": [filled(size(spec.shape, tokens), spec.dtype, random) for spec in setting.spec.weights],
        "output": [
            aligned_empty(size(spec.shape, tokens), TYPES[spec.dtype]) for spec in setting.spec.outputs
        ],
        "local": [
            aligned_empty(size(spec.shape, tokens), TYPES[spec.dtype]) for spec in setting.segment.locals
        ],
    }
    calls = [
        (
            call.function,
            [
                (pools[item.source][item.number].reshape(size(item.shape, tokens)), item.dtype)
                for item in call.operands
            ],
        )
        for call in setting.segment.calls
    ]
    beside = [operand for _, operands in calls for operand in operands]
    if how == "together":
        setting.run(setting.record.function, *own, *beside, out)
    elif how == "arriving":
        slots, state = fetched(setting, weights.view(np.uint8), index)
        table[...] = state[words.TABLE : words.TABLE + count]
        assert slots.any()
        setting.run(cached_beside_name(setting.record), *own[:4], state, own[4], *beside, out)
    else:
        for function, operands in calls:
            setting.run(function, *operands)
        setting.run(f"experts_{body.name}", *own, out)
    return [out, *pools["output"]]
