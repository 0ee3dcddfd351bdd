"""Every target's kernels take the same tensors: float32 values, and weights and caches in their stored type."""

from __future__ import annotations

from typing import Any

import pytest
from tvm import tirx

from moec.artifacts.model import ModelRecord
from moec.artifacts.words import ahead
from moec.artifacts.words.mailbox import SERVE, collect_name, post_name
from moec.artifacts.words.orders import FEED, ORDER
from moec.artifacts.words.slots import ASSIGN, CACHED, FETCH
from moec.compiler.kernels.cuda.dense.parameters import declare
from moec.compiler.kernels.linear_shape import LinearShape
from moec.compiler.lowering.kernel_library import CpuKernels, CudaKernels
from tests.support.graphs import parts

LANES = 8


def tensors(function: Any) -> list[tuple[str, list[str]]]:
    """Type and shape of each argument; symbolic extents as ``?``."""
    types = [parameter.ty for parameter in function.params]
    return [
        (str(kind.dtype), [str(int(n)) if isinstance(n, tirx.IntImm) else "?" for n in kind.shape])
        for kind in types
    ]


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_named_kernels_take_the_same_tensors_on_every_target(name: str) -> None:
    model = parts(name, "bfloat16").model
    cpu = {kernel: tensors(function) for kernel, function in CpuKernels(LANES, "x86_64").model(model)}
    cuda = {kernel: tensors(function) for kernel, function in CudaKernels().model(model)}
    assert [dtype for dtype, _ in cpu.pop(FEED)] == ["int64"] * 4
    sample = cuda.pop("sample")
    assert [dtype for dtype, _ in cpu.pop(SERVE)] == [
        *["int64", "int64", "float32", "float32", "float32", "int64", "int64", "float32"]
    ]
    for body in model.bodies:
        posted, collected = cuda.pop(post_name(body.name)), cuda.pop(collect_name(body.name))
        assert [dtype for dtype, _ in posted] == [
            "float32",
            "int64",
            "float32",
            *["int64"] * 4,
            *["float32"] * 2,
        ]
        assert [dtype for dtype, _ in collected] == ["float32", "int64", "int64", "float32"]
    assert [dtype for dtype, _ in sample] == ["float32", "int32", "int32", "uint8", "int64"]
    _check_cache_kernels(model, cuda)
    for kernels, found in ((CpuKernels(LANES, "x86_64"), cpu), (CudaKernels(), cuda)):
        for workspace in kernels.workspaces(model):
            assert found[workspace.function].pop(-2) == ("uint8", ["?"])
    assert cpu == cuda
    _check_types(model, cpu)


def _check_cache_kernels(model: ModelRecord, kernels: dict[str, list[tuple[str, list[str]]]]) -> None:
    """Those of experts off the GPU take the state besides; only a GPU has them."""
    assert kernels.pop(ASSIGN) == [("int64", ["?", "?"]), ("int64", ["?"]), *[("int64", ["?", "?"])] * 2]
    assert kernels.pop(FETCH) == [("int64", ["?"])]
    assert [dtype for dtype, _ in kernels.pop(ORDER)] == ["int64"] * 4
    words, table = ("int64", ["?"]), ("float32", ["?", "?"])
    assert kernels.pop(ahead.CHECK) == [("int64", ["?", "?"]), words]
    assert kernels.pop(ahead.SCORE_EARLY) == [table, ("bfloat16", ["?", "?"]), table]
    assert kernels.pop(ahead.SCORE_VOTES) == [("int64", ["?", "?"]), table, table]
    assert kernels.pop(ahead.GUESS) == [table, words, words]
    assert kernels.pop(ahead.BRING) == [words]
    for body in model.bodies:
        cached = kernels.pop(f"{CACHED}{body.name}")
        assert cached.pop(4) == ("int64", ["?"])
        assert cached == kernels[f"experts_{body.name}"]


def _check_types(model: ModelRecord, kernels: dict[str, list[tuple[str, list[str]]]]) -> None:
    for spec in model.attentions:
        caches = 1 if spec.latent else 2
        attended = [dtype for dtype, _ in kernels[f"attention_{spec.name}"]]
        assert attended == [
            *["float32"] * (1 + caches),
            *[spec.dtype] * caches,
            *["int32"] * 3,
            *["float32"] * spec.sinks,
            *([] if spec.heads is None else [spec.heads.dtype] * 3),
            "float32",
        ]
    for body in model.bodies:
        dtypes = [dtype for dtype, _ in kernels[f"experts_{body.name}"]]
        assert dtypes == ["float32", "int64", "float32", "int64", "float32"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_products_take_the_same_tensors_on_every_target(dtype: str, bias: bool) -> None:
    shape = LinearShape(12, 16, dtype, None if bias else 3, bias)
    cpu, cuda = (tensors(kernel) for kernel in (CpuKernels(LANES, "x86_64").linear(shape), declare(shape)))
    assert cpu == cuda
    assert [kind for kind, _ in cpu] == ["float32", dtype, *["float32"] * (1 + bias)]
