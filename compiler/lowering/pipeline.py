"""The passes in order: Relax segments with dense operators in, calls of scheduled loops out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax

from moec.compiler.kernels.cuda.dense.parameters import declare
from moec.compiler.kernels.cuda.dense.product import product, product_and_hopper
from moec.compiler.kernels.cuda.rows.kernel import rows
from moec.compiler.lowering.kernel_library import cpu_kernels
from moec.compiler.lowering.legalize import LEGALIZATIONS
from moec.compiler.lowering.passes.dispatch_linear import DispatchLinear
from moec.compiler.lowering.passes.dispatch_topk import DispatchTopk
from moec.compiler.lowering.passes.fuse_rows import KEPT, FuseRows
from moec.compiler.lowering.passes.lower_lookup import LowerLookup
from moec.compiler.lowering.passes.schedule_cpu import ScheduleCpu
from moec.compiler.lowering.passes.schedule_cuda import ScheduleCuda
from moec.compiler.lowering.tvm_targets import cuda_target
from moec.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from moec.compiler.kernels.rows.product import Product
    from moec.compiler.lowering.links import Link
    from moec.compiler.lowering.targets import Target


def simplify_passes() -> list[Any]:
    """Drop what no output needs, and compute once what is written twice."""
    return [relax.transform.DeadCodeElimination(), relax.transform.EliminateCommonSubexpr()]


def cpu_passes(target: Target) -> list[Any]:
    """Kernels for products and top-k; all other operators become loops, and chains of element-wise loops one."""
    kernels = cpu_kernels(target)
    return [
        DispatchLinear(kernels.linear),
        DispatchTopk(kernels.topk),
        LowerLookup(),
        relax.transform.LegalizeOps(dict(LEGALIZATIONS)),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        relax.transform.RewriteDataflowReshape(),
        ScheduleCpu(target.lanes),
    ]


def cuda_passes(
    target: Target, products: dict[str, Product] | None = None, links: Sequence[Link] = ()
) -> list[Any]:
    """Kernels for products; everything between two of them is one kernel, a block for each token.

    ``products`` gets what each kernel of products multiplies, by the kernel's name; ``links`` are between functions.
    """
    return [
        DispatchLinear(declare),
        LowerLookup(),
        relax.transform.LegalizeOps({**LEGALIZATIONS, **dict.fromkeys(KEPT, _keep)}),
        FuseRows(rows, product_and_hopper if "sm_90" in target.architectures else product, products, links),
        relax.transform.DeadCodeElimination(),
        ScheduleCuda(cuda_target(target)),
    ]


def _keep(_builder: Any, call: Any) -> Any:
    """Leave an operator as it is."""
    return call


def pipeline(
    target: Target, products: dict[str, Product] | None = None, links: Sequence[Link] = ()
) -> list[Any]:
    """Every pass for ``target``, in order; ``products`` and ``links`` as for ``cuda_passes``."""
    own = cuda_passes(target, products, links) if target.kind == "cuda" else cpu_passes(target)
    return [*simplify_passes(), *own]


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
            f"Cannot write the IR to {folder}.", f"{error}.", "Give --dump-ir a folder that can be written."
        ) from error
