"""Functions as machine code for this processor, through the passes that those of a compiled bundle go through."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

from moec.compiler.lowering.tir_pipeline import CPU_PIPELINE, register_cpu_pipeline


def machine_code(*functions: tirx.PrimFunc, **target: str | list[str]) -> Any:
    """A library of ``functions`` alone; ``target``: what LLVM is told, such as ``mcpu``."""
    register_cpu_pipeline()
    module = tvm.IRModule({str(function.attrs["global_symbol"]): function for function in functions})
    return tirx.build(module, tvm.target.Target({"kind": "llvm", **target}), pipeline=CPU_PIPELINE)
