"""Policies, and what they make of the records of a model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from moec.artifacts.quantization import FormatRule, Quantization
from moec.compiler import choose_formats
from moec.compiler.kernels.cpu import packed_codes
from moec.compiler.kernels.cuda.packed.codes import WIDENINGS
from moec.compiler.lowering import formats
from moec.compiler.lowering.formats import check_formats, takes_formats
from moec.compiler.quantization import POLICIES, Kept, policy_named, quantize, read_policy
from moec.errors import CheckpointError, CompileError, UsageError
from moec.formats import FORMATS
from tests.support.graphs import parts
from tests.support.notes import Notes

if TYPE_CHECKING:
    from pathlib import Path

    from moec.compiler.checkpoint import Checkpoint

FILE = {
    "name": "mine",
    "method": "nearest",
    "roles": {"experts": "int4"},
    "rules": [{"match": "layers.1.*", "format": "int8"}, {"match": "*", "format": "plain"}],
}


def test_the_tables_of_codes_are_those_of_the_kernels() -> None:
    for table in (formats.EXPERT_CODES, formats.DENSE_CODES):
        assert table == {"cpu": packed_codes.CODES.keys(), "cuda": WIDENINGS.keys()}


def test_recipes_are_called_like_formats() -> None:
    four = policy_named("int4")
    assert four.format_for("x.experts.down_proj", "experts") == "int4-g32"
    assert {four.format_for("x", role) for role in ("linear", "embedding", "head")} == {"int8-g128"}
    assert four.format_for("x", "router") is None
    assert not policy_named("none").roles
    for name in POLICIES[1:]:
        policy = policy_named(name)
        assert policy.name == name
        assert policy.format_for("x", "experts", kept="mxfp4") in FORMATS
    assert policy_named("keep").format_for("x", "experts") is None


def test_the_first_rule_that_matches_counts() -> None:
    policy = Quantization(
        "p",
        "nearest",
        {"experts": "int4-g64"},
        (FormatRule("*.0.*", "plain"), FormatRule("a.*", "int8"), FormatRule("*.down", "mxfp4")),
    )
    names = ["a.0.down", "a.1.down", "b.1.down", "b.1.up"]
    assert [policy.format_for(name, "experts") for name in names] == [None, "int8-g128", "mxfp4", "int4-g64"]
    assert policy.format_for("b.1.up", "linear") is None


def test_layers_in_different_formats_have_different_bodies() -> None:
    plain = parts("mixtral")
    downs = [source.down for source in plain.packing.experts]
    policy = replace(policy_named("int4"), rules=(FormatRule(downs[1], "int8"),))
    found = quantize(plain, policy)
    assert found.packing.quantization == policy
    bodies = {body.name: body for body in found.model.bodies}
    assert len(bodies) == len(found.model.bodies)
    for layer, before in zip(found.model.experts, plain.model.experts, strict=True):
        body = bodies[layer.body]
        original = next(one for one in plain.model.bodies if one.name == before.body)
        assert replace(body, name="", format=None) == replace(original, name="")
        assert body.format == ("int8-g128" if layer.layer == 1 else "int4-g32")
    assert {layer.body for layer in found.model.experts} == set(bodies)


def test_a_file_says_what_a_name_does(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(FILE))
    policy = read_policy(path)
    assert policy.format_for("layers.1.experts.down_proj", "experts") == "int8-g128"
    assert policy.format_for("layers.0.experts.down_proj", "experts") is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"method": "magic"}, "magic"),
        ({"roles": {"experts": "int5"}}, "int5"),
        ({"roles": {"expert": "int4"}}, "role expert"),
        ({"rules": [{"match": "*", "format": "int3"}]}, "int3"),
        ({"rules": [{"pattern": "*", "format": "int4"}]}, "match"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_wrong_file_is_refused(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(FILE | change))
    with pytest.raises(UsageError, match=text) as caught:
        read_policy(path)
    assert "docs/quantization.md" in caught.value.do


def test_formats_without_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize(parts("mixtral"), policy_named("int4")).model
    monkeypatch.setattr(formats, "EXPERT_CODES", {"cpu": frozenset({"int4"}), "cuda": frozenset({"int8"})})
    monkeypatch.setattr(formats, "DENSE_CODES", {"cpu": frozenset({"int8"}), "cuda": frozenset({"int4"})})
    check_formats(model, "cpu")
    check_formats(parts("mixtral").model, "cuda")
    assert not takes_formats(model, "cuda")
    with pytest.raises(CompileError, match="int4-g32 on cuda") as caught:
        check_formats(model, "cuda")
    assert "--quantization" in caught.value.do
    dense = quantize(parts("mixtral"), Quantization("p", "nearest", {"linear": "int8"}, ())).model
    check_formats(dense, "cpu")
    with pytest.raises(CompileError, match="int8-g128 on cuda"):
        check_formats(dense, "cuda")


def chosen(
    monkeypatch: pytest.MonkeyPatch, asked: Quantization | None, kept: dict[str, str]
) -> tuple[Any, list[str]]:
    """What becomes of a tiny model whose checkpoint has ``kept``, for a target that takes MXFP4 alone."""
    monkeypatch.setattr(formats, "EXPERT_CODES", {"cpu": frozenset({"e2m1"})})
    monkeypatch.setattr(choose_formats, "kept_formats", lambda *_: Kept(kept))
    log, checkpoint = Notes(), cast("Checkpoint", None)
    return choose_formats.with_formats(parts("mixtral"), checkpoint, asked, ("cpu",), log), log.notes


def unlisted(*_: object) -> dict[str, str]:
    raise CheckpointError("No weights.")


def test_by_default_codes_are_kept_where_kernels_can(monkeypatch: pytest.MonkeyPatch) -> None:
    downs = [source.down for source in parts("mixtral").packing.experts]
    assert chosen(monkeypatch, None, {}) == (parts("mixtral"), [])
    found, notes = chosen(monkeypatch, None, dict.fromkeys(downs, "mxfp4"))
    assert {body.format for body in found.model.bodies} == {"mxfp4"}
    assert found.packing.quantization == policy_named("keep")
    assert not notes
    found, notes = chosen(monkeypatch, None, dict.fromkeys(downs, "fp8-e4m3"))
    assert found == parts("mixtral")
    assert "dequantized" in notes[0]
    with pytest.raises(CompileError, match="fp8-e4m3"):
        chosen(monkeypatch, policy_named("keep"), dict.fromkeys(downs, "fp8-e4m3"))
    monkeypatch.setattr(choose_formats, "kept_formats", unlisted)
    checkpoint, log = cast("Checkpoint", None), Notes()
    assert choose_formats.with_formats(parts("mixtral"), checkpoint, None, ("cpu",), log) == parts("mixtral")
    assert "No weights." in log.notes[0]
    with pytest.raises(CheckpointError):
        choose_formats.with_formats(parts("mixtral"), checkpoint, policy_named("keep"), ("cpu",), log)
    found, _ = chosen(monkeypatch, policy_named("none"), dict.fromkeys(downs, "mxfp4"))
    assert found == parts("mixtral")
