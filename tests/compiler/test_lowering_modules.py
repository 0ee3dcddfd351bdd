from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from moec.compiler.lowering.lower import lower
from moec.compiler.lowering.targets import parse_target
from moec.errors import CompileError
from tests.support.segments import Embed, Graph, Module, Norm, Router, bare_model, trace

TOKENS = (1, 3, 1200)
"""One, a few, and enough that the loops are shared between threads."""


@dataclass(frozen=True)
class Compiled:
    path: Path
    dump: Path


def _segments() -> dict[str, Graph]:
    torch.manual_seed(0)
    norm = (torch.randn(1, 5, 64), torch.randn(64), torch.randn(24, 64), torch.randn(24))
    router = (torch.randn(5, 32), torch.randn(12, 32), torch.randn(12))
    embed = (torch.zeros(1, 5, dtype=torch.int64), torch.randn(37, 64).bfloat16())
    narrow = (norm[0], norm[1], norm[2].half(), norm[3])
    return {
        "segment_0": trace(Norm(), norm, 1),
        "segment_1": trace(Router(), router, 0),
        "segment_2": trace(Embed(), embed, 1),
        "segment_3": trace(Norm(), narrow, 1),
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    output, dump = tmp_path_factory.mktemp("module"), tmp_path_factory.mktemp("ir")
    segments = _segments()
    module = lower(bare_model(segments), segments, parse_target("cpu"), output, dump)
    assert module.files == (Path("model.so"), Path("program.json"))
    return Compiled(output, dump)


@pytest.mark.parametrize("tokens", TOKENS)
def test_norm_and_biased_product(compiled: Compiled, tokens: int) -> None:
    arguments = torch.randn(1, tokens, 64), torch.randn(64), torch.randn(24, 64), torch.randn(24)
    found = Module(compiled.path)("segment_0", *arguments)
    for value, expected in zip(found, Norm()(*arguments), strict=True):
        np.testing.assert_allclose(value, expected.numpy(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("tokens", TOKENS)
def test_product_with_a_narrow_weight(compiled: Compiled, tokens: int) -> None:
    arguments = torch.randn(1, tokens, 64), torch.randn(64), torch.randn(24, 64).half(), torch.randn(24)
    found = Module(compiled.path)("segment_3", *arguments)
    for value, expected in zip(found, Norm()(*arguments), strict=True):
        np.testing.assert_allclose(value, expected.numpy(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("tokens", TOKENS)
def test_rows_of_a_narrow_table(compiled: Compiled, tokens: int) -> None:
    ids, table = torch.randint(0, 37, (1, tokens)), torch.randn(37, 64).bfloat16()
    rows, logits = Module(compiled.path)("segment_2", ids, table)
    expected_rows, expected_logits = Embed()(ids, table)
    np.testing.assert_array_equal(rows, expected_rows.numpy())
    np.testing.assert_allclose(logits, expected_logits.numpy(), rtol=1e-5, atol=2e-5)


def test_wrong_ids_stay_within_the_table(compiled: Compiled) -> None:
    table = torch.randn(37, 64).bfloat16()
    rows, _ = Module(compiled.path)("segment_2", torch.tensor([[-5, 37, 1 << 40]]), table)
    np.testing.assert_array_equal(rows[0], table[[0, 36, 36]].float().numpy())


def test_rows_are_looked_up_and_widened_in_one_loop(compiled: Compiled) -> None:
    (fused,) = compiled.dump.glob("*-FuseTIR.py")
    calls = re.findall(r"cls\.(\w*take\w*)", fused.read_text())
    assert [name.rstrip("0123456789") for name in calls] == ["fused_take_cast"]


@pytest.mark.parametrize("tokens", TOKENS)
def test_group_limited_routing(compiled: Compiled, tokens: int) -> None:
    arguments = torch.randn(tokens, 32), torch.randn(12, 32), torch.randn(12)
    index, weight = Module(compiled.path)("segment_1", *arguments)
    expected_index, expected_weight = Router()(*arguments)
    np.testing.assert_array_equal(index, expected_index.numpy())
    np.testing.assert_allclose(weight, expected_weight.numpy(), rtol=1e-4, atol=1e-6)


def test_equal_router_scores_go_to_the_lower_index(compiled: Compiled) -> None:
    index, _ = Module(compiled.path)("segment_1", torch.ones(1, 32), torch.zeros(12, 32), torch.zeros(12))
    assert index.tolist() == [[0, 1, 2, 3, 4]]


def test_same_input_gives_the_same_bytes(compiled: Compiled, tmp_path: Path) -> None:
    segments = _segments()
    lower(bare_model(segments), segments, parse_target("cpu"), tmp_path)
    for name in ("model.so", "program.json"):
        assert (tmp_path / name).read_bytes() == (compiled.path / name).read_bytes()


def test_every_pass_is_dumped_in_order(compiled: Compiled) -> None:
    names = sorted(path.name for path in compiled.dump.iterdir())
    assert names[0] == "00-import.py"
    assert any(name.endswith("-DispatchLinear.py") for name in names)
    assert [int(name[:2]) for name in names] == list(range(len(names)))
    assert "R.matmul" in (compiled.dump / "00-import.py").read_text()
    assert str(compiled.dump) not in (compiled.path / "model.so").read_bytes().decode("latin-1")


def test_unsupported_operator_names_model_segment_and_operator(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.special.i0(x),)

    segments = {"segment_7": trace(Odd(), (torch.randn(3, 4),), 0)}
    with pytest.raises(CompileError, match="segment_7 of TinyForCausalLM") as error:
        lower(bare_model(segments), segments, parse_target("cpu"), tmp_path)
    assert "i0" in str(error.value)


@pytest.mark.parametrize("target", ["cpu-x86-64-v3", "cpu-x86-64-v4"])
def test_named_isas_compile_anywhere(target: str, tmp_path: Path) -> None:
    segments = {"segment_0": _segments()["segment_0"]}
    assert lower(bare_model(segments), segments, parse_target(target), tmp_path).target.name == target
    assert (tmp_path / "model.so").stat().st_size > 0
