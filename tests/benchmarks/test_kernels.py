"""The kernels' benchmark runs on the CPU's module too: its references agree, and it tells wrong from right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.kernels import reference
from benchmarks.kernels.attention_cases import attention_cases
from benchmarks.kernels.cases import Case, Judgement, measure, relative_error, verdict
from benchmarks.kernels.dense_cases import dense_cases
from benchmarks.kernels.expert_cases import _decode, expert_cases
from benchmarks.kernels.module import Module, open_module
from benchmarks.kernels.selection_cases import selection_cases
from benchmarks.kernels.state_cases import make_state_step, state_cases
from moec.artifacts.layout.experts import layout
from moec.artifacts.model import AttentionSpec, ExpertBody
from moec.compiler.kernels import reference as numpy_reference
from moec.compiler.kernels.reference import advance
from tests.support.compiling import compile_checkpoint
from tests.support.states import SPECS as STATE_SPECS
from tests.support.tiny_models import save

CPU = torch.device("cpu")
MODELS = ["deepseek_v2_lite", "gpt_oss"]


@pytest.fixture(scope="module", params=MODELS)
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp(request.param)
    return compiled(request.param, folder)


def compiled(name: str, folder: Path) -> Module:
    save(name, folder / "checkpoint", dtype=torch.bfloat16)
    compile_checkpoint(folder / "checkpoint", folder / "modules", dtype="bf16", modules_only=True)
    return open_module(folder / "modules", CPU)


def rows(cases: Any) -> list[dict[str, Any]]:
    return [measure(make(), 10.0, CPU, 1) for make in cases]


def assert_right(found: list[dict[str, Any]]) -> None:
    assert all(row["verdict"] in ("ok", "slow") for row in found), found
    assert all(row["us"] > 0 for row in found)


def test_experts(module: Module) -> None:
    found = rows(expert_cases(module, 1 << 20, ((8, 40, 6), (24, 512, 6))))
    assert len(found) == 7
    assert_right(found)


def test_attention(module: Module) -> None:
    found = rows(attention_cases(module, ((1, 70), (3, 33)), 70, 1 << 16))
    assert len(found) == 3 * len(module.model.attentions)
    assert_right(found)


def test_dense(module: Module) -> None:
    found = rows(dense_cases(module, module, (1, 2), (40,)))
    assert_right(found)
    assert sum(row["kernel"] == "all products of a step" for row in found) == 2


@pytest.mark.slow
def test_states(tmp_path: Path) -> None:
    found = rows(state_cases(compiled("qwen3_next", tmp_path), ((1, 1), (3, 7)), 1 << 16))
    assert len(found) == 4
    assert_right(found)


@pytest.mark.slow
def test_selections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.kernels.attention_cases.SELECTED", 20)
    module = compiled("deepseek_v32_selecting", tmp_path)
    found = rows(selection_cases(module, ((1, 1, 100), (2, 1, 70), (1, 20, 100), (1, 1, 1 << 20)), 1 << 16))
    assert len(found) == 3 * len(module.model.selections)
    assert_right(found)
    assert_right(rows(attention_cases(module, ((1, 70), (3, 33)), 70, 1 << 16)))


def test_an_expert_that_is_not_read_is_noticed(module: Module) -> None:
    case = _decode(module, module.model.bodies[0], 1, 6, 1 << 20)
    held: list[torch.Tensor] = case.calls[0].held  # type: ignore[attr-defined]
    index, weight = held[1], held[2]
    index[0, weight[0].argmax()] = -1
    assert measure(case, 10.0, CPU, 1)["verdict"] == "wrong"


@pytest.mark.parametrize(
    ("judgement", "reached", "expected"),
    [
        (Judgement(1e-4, True), 0.9, "ok"),
        (Judgement(2e-3, True), 0.9, "wrong"),
        (Judgement(float("nan"), True), 0.9, "wrong"),
        (Judgement(1e-4, False), 0.9, "not repeatable"),
        (Judgement(1e-4, True), 0.7, "slow"),
        (Judgement(1e-4, True), float("nan"), "slow"),
    ],
)
def test_verdict(judgement: Judgement, reached: float, expected: str) -> None:
    call: Callable[[], None] = lambda: None  # noqa: E731
    case = Case("k", "s", [call], lambda: judgement, 1e-3, 1, 1, "copy", 0.8)
    assert verdict(case, judgement, reached) == expected


def test_zeros_are_right_where_zeros_are_expected() -> None:
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.ones(3), torch.zeros(3)) == float("inf")


def test_what_is_not_a_number_is_infinitely_wrong() -> None:
    expected = torch.ones(3)
    assert relative_error(torch.tensor([1.0, float("nan"), 1.0]), expected) == float("inf")
    assert relative_error(expected * 1.5, expected) == pytest.approx(0.5)


SPECS = [
    AttentionSpec("a", 4, 2, 8, 6, 0.3, 0, 0, 0.0, False, False, "float16", None),
    AttentionSpec("a", 4, 1, 8, 6, 0.3, 5, 0, 2.0, True, True, "float16", None),
    AttentionSpec("a", 2, 2, 8, 6, 0.3, 0, 4, 0.0, True, False, "float16", None),
]


@pytest.mark.parametrize("spec", SPECS)
def test_attention_reference_is_numpys(spec: AttentionSpec) -> None:
    torch.manual_seed(0)
    query, position = torch.randn(3, spec.query_heads, spec.key_dim), torch.tensor([8, 9, 10])
    keys, values = (
        torch.randn(11, spec.kv_heads, spec.key_dim),
        torch.randn(11, spec.kv_heads, spec.value_dim),
    )
    if spec.latent:
        values = keys[..., : spec.value_dim]
    sinks = torch.randn(spec.query_heads) if spec.sinks else None
    found = reference.attention(spec, query, keys, values, position, sinks)
    for row, place in enumerate(position.tolist()):
        expected = numpy_reference.attention(
            spec,
            query[row].double().numpy(),
            keys.double().numpy(),
            values.double().numpy(),
            place,
            None if sinks is None else sinks.double().numpy(),
        )
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("gated", [True, False])
def test_experts_reference_is_numpys(gated: bool) -> None:
    torch.manual_seed(0)
    inner = ("mul", ("gelu_tanh", "gate"), ("min", "up", 0.5)) if gated else ("relu", "up")
    body = ExpertBody("b", 8, 6, gated, True, True, inner, "bfloat16")
    stride = layout(body).stride_bytes
    memory = torch.randn(3 * stride // 2, dtype=torch.bfloat16).view(torch.uint8).reshape(3, stride)
    x, weight = torch.randn(4, 8), torch.rand(4, 2)
    index = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2]])
    found = reference.experts(body, memory, x, index, weight)
    parts = [
        {name: part.numpy() for name, part in reference.expert_parts(body, data).items()} for data in memory
    ]
    expected = numpy_reference.experts(
        body, parts, x.double().numpy(), index.numpy(), weight.double().numpy()
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", STATE_SPECS)
def test_states_reference_is_numpys(name: str) -> None:
    torch.manual_seed(0)
    step = make_state_step(STATE_SPECS[name], 2, 3, CPU)
    out, states = step.expected(step.state)
    weights = [weight.double().numpy() for weight in step.weights]
    for row in range(2):
        state = step.state[row].double().numpy()
        for number in range(row * 3, row * 3 + 3):
            own = [each[0, number].double().numpy() for each in step.inputs]
            state, expected = advance(step.spec, state, int(step.position[number]), own, weights)
            np.testing.assert_allclose(out[0, number].numpy(), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(states[row].numpy(), state, rtol=1e-9, atol=1e-12)
