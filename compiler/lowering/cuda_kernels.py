"""Hand-written CUDA kernels to their host functions and CUDA source: our own explicit list of loop passes.

TVM's list for generated loops shrinks buffers that a primitive reaches through a pointer, moves barriers and reuses
registers as it sees fit; kernels that are written out to the last barrier want none of that. Nor is there a simplifier
here: it writes out what a variable is bound to at each of its uses, and the CUDA compiler folds constants anyway.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx


def cuda_loop_passes() -> list[Any]:
    """Buffers to flat memory, loops to vectors and straight lines, functions to host and device functions."""
    return [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.UnifyThreadBinding(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.VectorizeLoop(),
        tirx.transform.UnrollLoop(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.BF16StorageLegalize(),
    ]


def lower_kernels(module: tvm.IRModule) -> tvm.IRModule:
    """Run the list on kernels that are bound to threads and to a target."""
    return tvm.transform.Sequential(cuda_loop_passes())(module)


def finish_kernels(module: tvm.IRModule) -> tvm.IRModule:
    """The device functions as the code generator takes them."""
    return tirx.transform.LowerIntrin()(module)
