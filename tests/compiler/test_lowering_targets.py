from __future__ import annotations

import pytest

from moec.compiler.lowering.kernel_library import cpu_kernels
from moec.compiler.lowering.targets import (
    CUDA_ARCHITECTURES,
    TARGET_NAMES,
    host_level,
    parse_target,
    required_flags,
)
from moec.compiler.lowering.tvm_targets import host_target
from moec.errors import UsageError


def test_named_isas_need_the_flags_of_all_levels_below() -> None:
    target = parse_target("cpu-x86-64-v4")
    assert (target.kind, target.mcpu, target.lanes) == ("cpu", "x86-64-v4", 16)
    assert {"sse4_2", "avx2", "fma", "avx512f"} <= set(target.cpu_features)
    assert "avx512f" not in parse_target("cpu-x86-64-v3").cpu_features


def test_host_level_stops_at_the_first_missing_flag() -> None:
    full = frozenset(required_flags("x86-64-v4"))
    assert host_level(full, "x86_64") == "x86-64-v4"
    assert host_level(full - {"fma"}, "x86_64") == "x86-64-v2"
    assert host_level(full, "aarch64") == "generic"
    assert host_level(frozenset(), "x86_64") == "generic"


def test_a_level_that_llvm_has_no_name_for_is_another_with_more_features() -> None:
    target = parse_target("cpu-x86-64-v4-vnni")
    assert target.cpu_features == (*required_flags("x86-64-v4"), "avx512_vnni")
    assert host_level(frozenset(target.cpu_features), "x86_64") == target.mcpu
    described = host_target(target)
    assert str(described.attrs["mcpu"]) == "x86-64-v4"
    assert [str(feature) for feature in described.attrs["mattr"]] == ["+avx512vnni"]


def test_bfloat16_is_a_level_above_vnni() -> None:
    target = parse_target("cpu-x86-64-v4-bf16")
    assert target.cpu_features == (*required_flags("x86-64-v4-vnni"), "avx512_bf16")
    assert host_level(frozenset(target.cpu_features), "x86_64") == target.mcpu
    assert host_level(frozenset(target.cpu_features) - {"avx512_vnni"}, "x86_64") == "x86-64-v4"
    assert [str(feature) for feature in host_target(target).attrs["mattr"]] == ["+avx512vnni", "+avx512bf16"]


@pytest.mark.parametrize(("level", "paired"), [("vnni", False), ("bf16", True)])
def test_only_that_level_has_products_of_pairs(level: str, paired: bool) -> None:
    kernels = cpu_kernels(parse_target(f"cpu-x86-64-v4-{level}"))
    assert (kernels.pairs is not None) == paired


def test_cuda_has_all_architectures_or_the_named_one() -> None:
    assert parse_target("cuda").architectures == CUDA_ARCHITECTURES
    assert parse_target("cuda-sm_89").architectures == ("sm_89",)


@pytest.mark.parametrize("name", ["gpu", "cuda-sm_35", "cpu-x86-64-v5", ""])
def test_unknown_target_lists_the_choices(name: str) -> None:
    with pytest.raises(UsageError, match="Choose from: cpu, ") as error:
        parse_target(name)
    assert all(choice in str(error.value) for choice in TARGET_NAMES)
