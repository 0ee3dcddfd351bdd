"""From loops to what LLVM's code generator takes: TVM's list for the CPU, less what our loops have no use for.

TVM's own list of 45 passes also serves GPUs, accelerators and schedules that we do not make; on the large unrolled
bodies of the hand-written kernels it takes most of a compilation's time.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx

CPU_PIPELINE = "moec_cpu"
"""The name under which TVM's build finds the list."""


def cpu_loop_passes() -> list[Any]:
    """Blocks to loops, buffers to flat memory, loops to vectors, functions to packed functions."""
    return [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.BF16StorageLegalize(),
    ]


def register_cpu_pipeline() -> None:
    """Make the list known to TVM's build, which takes pipelines by name only."""
    tirx.register_tir_pipeline(CPU_PIPELINE, _factory)


def _factory() -> tuple[Any, Any, Any]:
    host = [tirx.transform.LowerTVMBuiltin(), tirx.transform.LowerIntrin()]
    return (
        tvm.transform.Sequential(cpu_loop_passes()),
        lambda: tvm.transform.Sequential(host),
        lambda: tvm.transform.Sequential([tirx.transform.LowerIntrin()]),
    )
