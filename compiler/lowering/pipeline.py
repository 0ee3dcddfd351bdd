"""The passes in order: Relax segments with dense operators in, calls of scheduled loops out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax

from moec.compiler.lowering.kernel_library import kernels_for
from moec.compiler.lowering.legalize import LEGALIZATIONS
from moec.compiler.lowering.passes.dispatch_linear import DispatchLinear
from moec.compiler.lowering.passes.dispatch_topk import DispatchTopk
from moec.compiler.lowering.passes.schedule_cpu import ScheduleCpu
from moec.compiler.lowering.passes.schedule_cuda import ScheduleCuda
from moec.compiler.lowering.tvm_targets import cuda_target
from moec.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from moec.compiler.lowering.targets import Target


def simplify_passes() -> list[Any]:
    """Drop what no output needs, and compute once what is written twice."""
    return [relax.transform.DeadCodeElimination(), relax.transform.EliminateCommonSubexpr()]


def dispatch_passes(target: Target) -> list[Any]:
    """Operators that have a hand-written kernel for the target become calls of it."""
    kernels = kernels_for(target)
    return [DispatchLinear(kernels.linear), DispatchTopk(kernels.topk)]


def fuse_passes() -> list[Any]:
    """All other operators become loops, and chains of element-wise loops become one."""
    return [
        relax.transform.LegalizeOps(dict(LEGALIZATIONS)),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        relax.transform.RewriteDataflowReshape(),
    ]


def schedule_passes(target: Target) -> list[Any]:
    """Loops get their order, their threads and their vectors."""
    return [ScheduleCuda(cuda_target(target))] if target.kind == "cuda" else [ScheduleCpu(target.lanes)]


def pipeline(target: Target) -> list[Any]:
    """Every pass for ``target``, in order."""
    return [
        *simplify_passes(),
        *dispatch_passes(target),
        *fuse_passes(),
        *schedule_passes(target),
    ]


def run_passes(module: tvm.IRModule, passes: Sequence[Any], dump_ir: Path | None) -> tvm.IRModule:
    """Run ``passes`` one after the other; with ``dump_ir``, write the module after each as ``NN-name.py`` there."""
    _dump(module, dump_ir, 0, "import")
    for number, step in enumerate(passes, start=1):
        module = step(module)
        _dump(module, dump_ir, number, str(step.info.name))
    return module


def _dump(module: tvm.IRModule, folder: Path | None, number: int, name: str) -> None:
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}-{name}.py").write_text(module.script() + "\n")
    except OSError as error:
        raise OutputError(
            f"cannot write the IR to {folder}", str(error), "give --dump-ir a writable folder"
        ) from error
