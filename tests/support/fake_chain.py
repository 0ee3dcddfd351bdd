"""A tiny chain whose functions are numpy: records, a bundle-like object, and what it should compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.files.safetensors import TensorPlace
from moec.artifacts.ids import LayerId, TensorName, ValueId
from moec.artifacts.layout.cache import PAGE_TOKENS
from moec.artifacts.model import (
    AttentionSpec,
    ExpertBody,
    ExpertsLayer,
    FunctionSpec,
    GenerationDefaults,
    ModelRecord,
    TensorSpec,
)
from moec.artifacts.program import Call, LocalSpec, Operand, ProgramRecord, SegmentProgram, Workspace
from moec.artifacts.steps import AttentionStep, ExpertsStep, SegmentStep
from moec.runtime.tensors import aligned_empty

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from moec.artifacts.program import Source

VOCAB, HIDDEN, HEADS, WIDTH, EXPERTS, TOP = 23, 16, 2, 8, 5, 2

Array = Any


def _f32(*shape: int | str) -> TensorSpec:
    return TensorSpec("float32", shape)  # type: ignore[arg-type]


HEAD_SHAPE = _f32(1, "T", HEADS, WIDTH)
VALUES = {
    "q": HEAD_SHAPE,
    "k": HEAD_SHAPE,
    "v": HEAD_SHAPE,
    "a": HEAD_SHAPE,
    "h": _f32("T", HIDDEN),
    "index": TensorSpec("int64", ("T", TOP)),
    "weight": _f32("T", TOP),
    "e": _f32("T", HIDDEN),
    "logits": _f32(1, "T", VOCAB),
}
DEFAULTS = GenerationDefaults(None, (), None, False, 1.0, 0, 1.0, 1.0)


def _segment(function: str, inputs: str, weights: tuple[str, ...], outputs: str) -> SegmentStep:
    names = tuple(ValueId(name) for name in inputs.split())
    results = tuple(ValueId(name) for name in outputs.split())
    return SegmentStep("segment", function, names, tuple(map(TensorName, weights)), results, side=False)


def record() -> ModelRecord:
    """Embedding and q, k, v; attention; router; experts; then (rows wanted only) the logits."""
    steps = (
        _segment("segment_0", "tokens positions", ("embed",), "q k v"),
        AttentionStep(
            "attention",
            "full",
            LayerId(0),
            ValueId("q"),
            ValueId("k"),
            ValueId("v"),
            None,
            None,
            ValueId("a"),
        ),
        _segment("segment_1", "a tokens", ("embed",), "h index weight"),
        ExpertsStep("experts", LayerId(0), ValueId("h"), ValueId("index"), ValueId("weight"), ValueId("e")),
        _segment("segment_2", "e h", ("head",), "logits"),
    )
    functions = tuple(
        FunctionSpec(
            step.function,
            tuple(VALUES.get(name, TensorSpec("int64", (1, "T"))) for name in step.inputs),
            (_f32(VOCAB, HIDDEN),),
            tuple(VALUES[name] for name in step.outputs),
        )
        for step in steps
        if isinstance(step, SegmentStep)
    )
    return ModelRecord(
        "fake",
        "Fake",
        "float32",
        VOCAB,
        HIDDEN,
        256,
        {ValueId(name): spec for name, spec in VALUES.items()},
        functions,
        (AttentionSpec("full", HEADS, HEADS, WIDTH, WIDTH, 1.0, 0, 0, 0.0, False, False, "float32", None),),
        (),
        (ExpertBody("body", HIDDEN, 4, False, False, False, "up", "float32"),),
        (ExpertsLayer(LayerId(0), "experts", "body", EXPERTS, TOP),),
        steps,
        4,
        DEFAULTS,
    )


@dataclass(frozen=True)
class Weights:
    """All numbers of the fake model."""

    embed: NDArray[np.float32]
    head: NDArray[np.float32]
    experts: NDArray[np.float32]
    """``[EXPERTS, 1024]``: one 4 KiB page each, of which the first HIDDEN numbers scale the input."""


def weights(path: Path) -> Weights:
    """Random weights; the experts are a mapped file, as in a bundle."""
    random = np.random.default_rng(1)
    random.standard_normal((EXPERTS, 1024), np.float32).tofile(path)
    experts = np.memmap(path, np.float32, mode="r", shape=(EXPERTS, 1024))
    embed, head = (random.standard_normal((VOCAB, HIDDEN), np.float32) for _ in range(2))
    return Weights(embed, head, experts)


class FakeBundle:
    """What binding looks at of a bundle."""

    def __init__(self, weights: Weights) -> None:
        self.model = record()
        self._arrays = {"embed": weights.embed, "head": weights.head}
        for name, array in self._arrays.items():
            copy = aligned_empty(array.shape, array.dtype)
            copy[...] = array
            self._arrays[name] = copy
        self.dense = {
            name: TensorPlace("float32", array.shape, 0, array.nbytes) for name, array in self._arrays.items()
        }

    def dense_view(self, name: str) -> NDArray[np.uint8]:
        return self._arrays[name].view(np.uint8).reshape(-1)


def scatter(tokens: Array, embed: Array) -> tuple[Array, Array, Array]:
    """q, k and v ``[T, HEADS, WIDTH]`` of token ids ``[T]``."""
    x = embed[tokens].reshape(-1, HEADS, WIDTH)
    return x * 2, x + 1, x - 1


def combine(attended: Array, tokens: Array, embed: Array) -> Array:
    """Hidden states ``[T, HIDDEN]``."""
    return attended.reshape(len(tokens), HIDDEN) + embed[tokens]


def route(hidden: Array) -> tuple[Array, Array, Array]:
    """Hidden states ``[T, HIDDEN]``, chosen experts and their weights ``[T, TOP]``."""
    scores = hidden[:, :EXPERTS]
    index = np.argsort(-scores, axis=1, kind="stable")[:, :TOP].astype(np.int64)
    return hidden, index, np.take_along_axis(scores, index, 1)


def attend(q: Array, keys: Array, values: Array) -> Array:
    """One token's ``[HEADS, WIDTH]`` over ``[n, HEADS, WIDTH]``, without a softmax."""
    return np.einsum("hd,nhd,nhe->he", q, keys, values).astype(np.float32) / len(keys)


def program() -> ProgramRecord:
    """The segments of `record` as calls of `functions`; the second has a local, which is copied to its output."""
    specs = {name: (spec.dtype, spec.shape) for name, spec in VALUES.items()}
    ids, table, hidden = ("int64", (1, "T")), ("float32", (VOCAB, HIDDEN)), specs["h"]

    def operand(source: Source, number: int, kind: Any) -> Operand:
        return Operand(source, number, *kind)

    def segment(number: int, calls: list[Call], outputs: str, *local: LocalSpec) -> SegmentProgram:
        places = tuple(operand("output", place, specs[name]) for place, name in enumerate(outputs.split()))
        return SegmentProgram(f"segment_{number}", local, tuple(calls), places)

    weight, inputs = operand("weight", 0, table), (operand("input", 0, ids), operand("input", 1, ids))
    heads = tuple(operand("output", number, specs["q"]) for number in range(3))
    local = operand("local", 0, ("float32", ("T", HEADS, WIDTH)))
    flat = operand("local", 0, hidden)
    attended, tokens = operand("input", 0, specs["a"]), operand("input", 1, ids)
    routed = tuple(operand("output", n, specs[name]) for n, name in enumerate(("h", "index", "weight")))
    mixed = (operand("input", 0, specs["e"]), operand("input", 1, hidden))
    logits = operand("output", 0, specs["logits"])
    return ProgramRecord(
        (
            segment(0, [Call("scatter", (*inputs, weight, *heads))], "q k v"),
            segment(
                1,
                [Call("combine", (attended, tokens, weight, local)), Call("route", (flat, *routed))],
                "h index weight",
                LocalSpec("float32", ("T", HIDDEN)),
            ),
            segment(2, [Call("project", (*mixed, weight, logits))], "logits"),
        ),
        (Workspace("route", 64, 8), Workspace("attention_full", 0, 4)),
    )


def functions() -> dict[str, Callable[..., Any]]:
    """The program's functions by name, over DLPack tensors."""
    return {
        "scatter": _scatter,
        "combine": _combine,
        "route": _route,
        "project": _project,
        "attention_full": _attention,
        "experts_body": _experts,
    }


def _scatter(tokens: Any, positions: Any, embed: Any, *outs: Any) -> None:
    read: Callable[[Any], Array] = np.from_dlpack
    assert read(tokens).shape == read(positions).shape
    for out, part in zip(outs, scatter(read(tokens)[0], read(embed)), strict=True):
        read(out)[0] = part


def _combine(attended: Any, tokens: Any, embed: Any, out: Any) -> None:
    result = combine(np.from_dlpack(attended)[0], np.from_dlpack(tokens)[0], np.from_dlpack(embed))
    np.from_dlpack(out)[...] = result.reshape(len(result), HEADS, WIDTH)


def _route(hidden: Any, *outs: Any) -> None:
    *results, workspace, last = outs
    scratch: Array = np.from_dlpack(workspace)
    assert scratch.shape == (64 + 8 * len(np.from_dlpack(hidden)),)
    scratch[...] = 0xFF
    for out, part in zip((*results, last), route(np.from_dlpack(hidden)), strict=True):
        np.from_dlpack(out)[...] = part


def _project(experts: Any, hidden: Any, head: Any, out: Any) -> None:
    read: Callable[[Any], Array] = np.from_dlpack
    read(out)[0] = (read(experts) + read(hidden)) @ read(head).T


def _attention(
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    table: Any,
    sequence: Any,
    position: Any,
    workspace: Any,
    out: Any,
) -> None:
    keys, values = np.from_dlpack(k_cache), np.from_dlpack(v_cache)
    rows, places = np.from_dlpack(sequence), np.from_dlpack(position)
    assert np.from_dlpack(workspace).shape == (4 * len(rows),)
    pages = np.from_dlpack(table)[rows, places // PAGE_TOKENS]
    keys[pages, :, places % PAGE_TOKENS] = np.from_dlpack(k)[0]
    values[pages, :, places % PAGE_TOKENS] = np.from_dlpack(v)[0]
    for token, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
        seen = np.arange(place + 1)
        pages = np.from_dlpack(table)[row, seen // PAGE_TOKENS]
        lines = seen % PAGE_TOKENS
        np.from_dlpack(out)[0, token] = attend(
            np.from_dlpack(q)[0, token], keys[pages, :, lines], values[pages, :, lines]
        )


def _experts(x: Any, index: Any, weight: Any, table: Any, out: Any) -> None:
    import ctypes

    addresses = np.from_dlpack(table).tolist()
    result = np.from_dlpack(out)
    result[...] = 0
    for row, choices in enumerate(np.from_dlpack(index).tolist()):
        for place, expert in enumerate(choices):
            memory = (ctypes.c_float * HIDDEN).from_address(addresses[expert])
            scale = np.frombuffer(memoryview(memory), np.float32)
            result[row] += np.from_dlpack(weight)[row, place] * scale * np.from_dlpack(x)[row]


def expected_logits(tokens: list[int], weights: Weights) -> NDArray[np.float32]:
    """Logits ``[T, VOCAB]`` of one sequence, computed directly."""
    ids = np.array(tokens)
    q, k, v = scatter(ids, weights.embed)
    attended = np.stack([attend(q[n], k[: n + 1], v[: n + 1]) for n in range(len(ids))])
    hidden, index, weight = route(combine(attended, ids, weights.embed))
    scales = np.asarray(weights.experts)[index, :HIDDEN]
    mixed = (weight[:, :, None] * scales * hidden[:, None]).sum(1, dtype=np.float32)
    logits: NDArray[np.float32] = ((mixed + hidden) @ weights.head.T).astype(np.float32)
    return logits
