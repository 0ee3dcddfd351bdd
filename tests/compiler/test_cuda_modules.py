"""CUDA modules made on a machine without a GPU: machine code inside, no source, and what a loader needs."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
import tvm

from moec.artifacts.program import HOPPER
from moec.compiler.kernels.cuda.dense.product import product
from moec.compiler.kernels.linear_shape import LinearShape
from moec.compiler.kernels.rows.product import Product
from moec.compiler.lowering.cuda_module import KERNEL, _each_kernel, split_kernels
from moec.compiler.lowering.fatbin import FatbinEntry, architectures, read_fatbin, write_fatbin
from moec.compiler.lowering.lower import LoweredModule, import_segments, lower, packed_functions
from moec.compiler.lowering.nvrtc import compile_cubin, cuda_root
from moec.compiler.lowering.pipeline import pipeline, run_passes
from moec.compiler.lowering.program import read_segment
from moec.compiler.lowering.targets import CUDA_ARCHITECTURES, parse_target
from moec.errors import CompileError, MissingDependencyError
from tests.support.arrays import aligned, plain
from tests.support.canaries import most_slow
from tests.support.cuda_emulator import Emulated
from tests.support.graphs import parts

PRODUCT = Product((LinearShape(600, 64, "bfloat16", None, False),), None, "x")
PTX = b".version 9.1\n.target sm_120\n"


def _has_cuda_compiler() -> bool:
    try:
        cuda_root()
    except MissingDependencyError:
        return False
    return True


needs_compiler = pytest.mark.skipif(
    not _has_cuda_compiler(), reason="NVIDIA's compiler packages are not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cuda")
    _lower("mixtral", "cuda", output)
    return output


def _lower(name: str, target: str, output: Path) -> LoweredModule:
    model = parts(name, "bfloat16")
    return lower(model.model, model.functions, parse_target(target), output)


@needs_compiler
@pytest.mark.slow
def test_machine_code_for_every_architecture_and_ptx_of_the_newest(folder: Path) -> None:
    expected = [*CUDA_ARCHITECTURES, "compute_120"]
    assert architectures(folder / "kernels.fatbin") == expected
    for entry in read_fatbin(folder / "kernels.fatbin")[:-1]:
        assert entry.code.startswith(b"\x7fELF")
        assert _machine_of_cubin(entry.code) == int(entry.architecture.removeprefix("sm_"))


@needs_compiler
@pytest.mark.slow
def test_no_file_holds_cuda_source(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert [path.name for path in files] == ["host.so", "kernels.fatbin", "kernels.json", "program.json"]
    for path in files:
        data = path.read_bytes()
        assert b"__global__" not in data
        assert b'extern "C"' not in data
        assert b"#include" not in data


@needs_compiler
@pytest.mark.slow
def test_every_kernel_of_the_table_is_in_the_machine_code(folder: Path) -> None:
    table = json.loads((folder / "kernels.json").read_text())["func_info"]
    assert any(name.startswith("attention_") for name in table)
    assert any(name.startswith("experts_") for name in table)
    for entry in read_fatbin(folder / "kernels.fatbin"):
        for name, facts in table.items():
            assert name.encode() in entry.code
            assert {"blockIdx.x", "threadIdx.x"} <= set(facts["launch_param_tags"])


@needs_compiler
@pytest.mark.parametrize("name", most_slow(["gpt_oss", "deepseek_v3"], ()))
def test_one_named_architecture(name: str, tmp_path: Path) -> None:
    """Of models whose attention has sinks, and latents."""
    module = _lower(name, "cuda-sm_89", tmp_path)
    assert [str(path) for path in module.files] == [
        "host.so",
        "kernels.fatbin",
        "kernels.json",
        "program.json",
    ]
    assert architectures(tmp_path / "kernels.fatbin") == ["sm_89", "compute_89"]


@needs_compiler
def test_source_that_does_not_compile_is_an_error_with_the_log() -> None:
    with pytest.raises(CompileError, match="undefined_name"):
        compile_cubin("__global__ void f() { undefined_name = 1; }", "sm_80")


def test_container_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.fatbin"
    write_fatbin(path, [FatbinEntry("elf", "sm_80", b"\x7fELF1234"), FatbinEntry("ptx", "sm_120", PTX)])
    assert architectures(path) == ["sm_80", "compute_120"]
    first, second = read_fatbin(path)
    assert first.code == b"\x7fELF1234"
    assert second.code.startswith(PTX)


@pytest.mark.parametrize(
    "data", [b"", b"\x7fELF" + b"\0" * 60, struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 9999)]
)
def test_what_is_no_container_is_an_error(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.fatbin"
    path.write_bytes(data)
    with pytest.raises(CompileError, match="not a fat binary"):
        architectures(path)


def _machine_of_cubin(code: bytes) -> int:
    """The architecture in the flags of a cubin's ELF header: its second byte since CUDA 13, the first before."""
    flags: int
    (flags,) = struct.unpack_from("<I", code, 48)
    return flags >> 8 & 0xFF if code[8] >= 8 else flags & 0xFF


def test_dynamic_memory_has_a_name_of_its_own_in_every_kernel() -> None:
    def kernel(kind: str) -> str:
        return (
            f"{KERNEL} k() {{\n  extern __shared__ __align__(128) {kind} _ptr[];\n  _ptr[0] = _ptr_1;\n}}\n"
        )

    first, second = _each_kernel(kernel("uchar") + kernel("ushort")).split(KERNEL)[1:]
    assert "uchar _ptr_of_0[];\n  _ptr_of_0[0] = _ptr_1;" in first
    assert "ushort _ptr_of_1[];\n  _ptr_of_1[0] = _ptr_1;" in second


def _functions_of(target: str) -> set[str]:
    model = parts("mixtral", "bfloat16")
    module = run_passes(import_segments(model.functions, model.model), pipeline(parse_target(target)), None)
    inputs = {function.name: len(function.inputs) for function in model.model.functions}
    segments = [read_segment(name, module[name], inputs[name], "Mixtral") for name in model.functions]
    packed = packed_functions(module, segments, {})
    return {str(function.attrs["global_symbol"]) for _, function in packed.functions_items()}


def test_products_have_functions_for_hopper_gpus_where_the_target_has_code_for_them() -> None:
    names = _functions_of("cuda-sm_90")
    products = {name for name in names if name.startswith("linear") and not name.endswith(HOPPER)}
    assert products
    assert {name + HOPPER for name in products} == {name for name in names if name.endswith(HOPPER)}
    assert not [name for name in _functions_of("cuda-sm_89") if name.endswith(HOPPER)]


def test_functions_launch_one_kernel_where_theirs_are_alike() -> None:
    both = [
        product(PRODUCT).with_attr("global_symbol", "any"),
        product(PRODUCT, hopper=True).with_attr("global_symbol", "hopper"),
    ]

    def kernels(*functions: tvm.tirx.PrimFunc) -> int:
        named = {str(function.attrs["global_symbol"]): function for function in functions}
        return len(split_kernels(tvm.IRModule(named), parse_target("cuda-sm_90"))[1].functions)

    few = 1  # the other kernels round to panels, and read these, on Hopper GPUs alone
    assert kernels(*both) == kernels(both[0]) + kernels(both[1]) - few
    emulated = Emulated(*both)
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(600, 64, generator=generator).bfloat16()
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 64, generator=generator)
        outs = [aligned(torch.full((tokens, 600), float("nan"))) for _ in both]
        for name, out in zip(("any", "hopper"), outs, strict=True):
            scratch = aligned(torch.zeros(tokens, 64).bfloat16())
            emulated(name, aligned(x), aligned(w), scratch, out)
        assert torch.allclose(plain(outs[0]), plain(outs[1]), rtol=1e-5, atol=1e-4)
        assert torch.isfinite(plain(outs[1])).all()
