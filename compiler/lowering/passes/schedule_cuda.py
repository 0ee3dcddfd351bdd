"""TVM's default GPU schedules (DLight) for the loops that TVM generates.

Before::

    for t, n in T.grid(T, 2048): y[t, n] = x[t, n] + b[n]

After::

    for block in T.thread_binding(ceildiv(T * 2048, 1024), thread="blockIdx.x"):
        for thread in T.thread_binding(1024, thread="threadIdx.x"):
            if block * 1024 + thread < T * 2048: ...

Correct everywhere, fast hardly anywhere: the kernels that matter are written by hand (``compiler/kernels/cuda``).
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.s_tir import dlight


@tvm.transform.module_pass(opt_level=0, name="ScheduleCuda")
class ScheduleCuda:
    """Bind the loops of every function that has none to GPU threads.

    Args:
        target: TVM's target, which has the limits of the architecture.
    """

    def __init__(self, target: tvm.target.Target) -> None:
        self.target = target

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        """Schedule the PrimFuncs of ``module``."""
        rules = (
            dlight.gpu.Matmul(),
            dlight.gpu.GEMV(),
            dlight.gpu.Reduction(),
            dlight.gpu.GeneralReduction(),
            dlight.gpu.Fallback(),
        )
        with self.target:
            return dlight.ApplyDefaultSchedule(*rules)(module)
