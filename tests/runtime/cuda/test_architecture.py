from __future__ import annotations

import pytest

from moec.artifacts.files.manifest import TargetRecord
from moec.artifacts.words.interface import interface
from moec.errors import DeviceError
from moec.runtime.devices.cuda.modules.architecture import (
    architecture_name,
    choose_cuda_target,
    parse_architecture,
)
from moec.runtime.devices.cuda.modules.module import EARLY_LAUNCH, launch_table

ALL = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
FEATURES = frozenset({"avx2", "fma"})


def target(*architectures: str, name: str = "cuda", features: tuple[str, ...] = ("avx2",)) -> TargetRecord:
    return TargetRecord(name, "cuda", architectures, features, (), interface())


def chosen(targets: tuple[TargetRecord, ...], capability: tuple[int, int]) -> str:
    return choose_cuda_target(targets, capability, "A GPU", FEATURES).name


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_names_go_both_ways(capability: tuple[int, int]) -> None:
    assert parse_architecture(architecture_name(capability)) == capability


@pytest.mark.parametrize(
    "capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)]
)
def test_the_target_for_all_runs_everywhere_from_sm_80_on(capability: tuple[int, int]) -> None:
    """Newer ones through PTX."""
    assert chosen((target(*ALL),), capability) == "cuda"


@pytest.mark.parametrize(
    ("have", "capability", "runs"),
    [
        (("sm_86",), (8, 9), True),  # machine code of the same major version
        (("sm_89",), (8, 6), False),  # of a later minor one
        (("sm_89",), (9, 0), True),  # PTX
        (("sm_90",), (8, 9), False),
        (("sm_80",), (7, 5), False),
    ],
)
def test_what_runs_where(have: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
    if runs:
        assert chosen((target(*have),), capability) == "cuda"
    else:
        with pytest.raises(DeviceError, match=architecture_name(capability)) as caught:
            chosen((target(*have),), capability)
        assert have[0] in caught.value.why
        assert "A GPU" in caught.value.what


def test_machine_code_is_better_than_ptx_and_newer_better_than_older() -> None:
    targets = (
        target("sm_80", name="a"),
        target("sm_86", name="b"),
        target("sm_89", name="c"),
    )
    assert chosen(targets, (8, 6)) == "b"
    assert chosen(targets, (8, 9)) == "c"
    assert chosen((target("sm_89", name="ptx"), target("sm_90", name="code")), (9, 0)) == "code"


def test_a_bundle_without_cuda_and_a_processor_without_instructions() -> None:
    cpu = TargetRecord("cpu", "cpu", (), (), (), interface())
    with pytest.raises(DeviceError, match="no CUDA module") as caught:
        chosen((cpu,), (9, 0))
    assert caught.value.do == "Compile again with --target cuda-sm_90, or with --target cuda."
    with pytest.raises(DeviceError, match="avx512f"):
        chosen((target(*ALL, features=("avx2", "avx512f")),), (9, 0))


def test_early_launches_are_for_gpus_that_have_them() -> None:
    table = {"func_info": {"f": {"name": "f", "launch_param_tags": ["blockIdx.x", EARLY_LAUNCH, "shared"]}}}
    assert launch_table(table, (9, 0)) == table
    assert launch_table(table, (8, 9))["func_info"]["f"]["launch_param_tags"] == ["blockIdx.x", "shared"]
    assert EARLY_LAUNCH in table["func_info"]["f"]["launch_param_tags"]
