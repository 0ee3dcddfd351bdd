"""Compile kernels for a vector width, and make the tensors that they take."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.machine_code import machine_code

os.environ.setdefault("TVM_NUM_THREADS", "2")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = {"bfloat16": 5e-3, "float16": 7e-4, "float32": 2e-6}
"""Of a result, relative to the largest: the rounding of what is stored, and of float32 sums."""
PROCESSORS = {16: "x86-64-v4", 8: "x86-64-v3", 4: "x86-64"}


def _has(lanes: int) -> bool:
    from pathlib import Path

    flags = Path("/proc/cpuinfo").read_text().split()
    return {16: "avx512f", 8: "avx2", 4: "sse2"}[lanes] in flags


@pytest.fixture(scope="session")
def compiled() -> Callable[[Any, int], Callable[..., None]]:
    """``compiled(prim_func, lanes)``: the kernel as machine code; skips where this processor cannot run it."""

    def build(function: Any, lanes: int) -> Callable[..., None]:
        if not _has(lanes):
            pytest.skip(f"this processor has no vectors of {lanes} floats")
        kernel: Callable[..., None] = machine_code(function, mcpu=PROCESSORS[lanes])[
            str(function.attrs["global_symbol"])
        ]
        return kernel

    return build


@pytest.fixture
def guarded() -> Callable[[torch.Tensor], torch.Tensor]:
    """``guarded(tensor)``: a 64-byte aligned copy that ends where the process may read no further."""
    import ctypes
    import mmap

    held: list[mmap.mmap] = []
    libc = ctypes.CDLL(None, use_errno=True)

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        data = tensor.contiguous().view(-1).view(torch.uint8)
        size = -(-max(1, data.numel()) // 64) * 64
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        area = mmap.mmap(-1, pages + mmap.PAGESIZE)
        held.append(area)
        bytes_ = torch.frombuffer(area, dtype=torch.uint8)
        fence = ctypes.c_void_p(bytes_.data_ptr() + pages)
        assert libc.mprotect(fence, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        begin = pages - size
        bytes_[begin : begin + data.numel()] = data
        return bytes_[begin : begin + data.numel()].view(tensor.dtype).view(tensor.shape)

    return copy
