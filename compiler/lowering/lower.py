"""The ``lower`` stage: the segments and kernels of a model to one module for a target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import tvm
from tvm import tirx

from moec.artifacts.files.records import write_record
from moec.artifacts.paths import PROGRAM_NAME
from moec.artifacts.program import HOPPER, ProgramRecord
from moec.compiler.kernels.cuda.dense.product import ON_HOPPER
from moec.compiler.lowering.cuda_module import export_cuda
from moec.compiler.lowering.formats import check_formats
from moec.compiler.lowering.kernel_library import kernels_for
from moec.compiler.lowering.link import link
from moec.compiler.lowering.links import links_of
from moec.compiler.lowering.pipeline import pipeline, run_passes
from moec.compiler.lowering.program import read_segment
from moec.compiler.lowering.relax_import import import_segment
from moec.compiler.lowering.tir_pipeline import CPU_PIPELINE, register_cpu_pipeline
from moec.compiler.lowering.tvm_targets import host_target

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch.fx

    from moec.artifacts.model import ModelRecord
    from moec.artifacts.program import SegmentProgram
    from moec.compiler.kernels.rows.product import Product
    from moec.compiler.lowering.targets import Target

MODULE_NAME = "model.so"
"""The machine code of a CPU module."""


class Segment(Protocol):
    """What lowering needs of a partitioned segment."""

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        """Placeholders are the inputs, then the weights, as its ``FunctionSpec`` lists them."""


@dataclass(frozen=True)
class LoweredModule:
    """One target's module on disk."""

    target: Target
    files: tuple[Path, ...]
    """Relative to the output folder."""


def lower(
    model: ModelRecord,
    functions: Mapping[str, Segment],
    target: Target,
    output: Path,
    dump_ir: Path | None = None,
) -> LoweredModule:
    """Compile ``functions``, and the kernels that the steps of ``model`` name, for ``target`` into ``output``.

    Args:
        model: the chain; its attentions and bodies say which kernels are needed, its functions which parameters of a
            segment are inputs.
        functions: every segment by its name.
        target: see ``targets.parse_target``.
        output: an existing folder, ``modules/<target.name>`` of the bundle.
        dump_ir: a folder for the IR after each pass.

    Raises:
        CompileError: an operator cannot be imported or made part of a program, or a tool failed.
        UnsupportedModelError: the target has no kernels for what the model does.
        MissingDependencyError: a compiler piece is not installed.
        OutputError: ``dump_ir`` cannot be written.
    """
    check_formats(model, target.kind)
    module = import_segments(functions, model)
    products: dict[str, Product] = {}
    module = run_passes(module, pipeline(target, products, links_of(model)), dump_ir)
    kernels = kernels_for(target)
    inputs = {function.name: len(function.inputs) for function in model.functions}
    segments = tuple(read_segment(name, module[name], inputs[name], model.class_name) for name in functions)
    beside = dict(kernels.beside(model, segments, products))
    together = {name: function for made in beside.values() for name, function in made.items()}
    packed = packed_functions(module, segments, dict(kernels.model(model)) | together)
    export = export_cuda if target.kind == "cuda" else export_cpu
    files = export(packed, target, output)
    program = ProgramRecord(segments, tuple(kernels.workspaces(model)), tuple(beside))
    write_record(program, output / PROGRAM_NAME)
    return LoweredModule(target, (*files, Path(PROGRAM_NAME)))


def packed_functions(
    module: tvm.IRModule, segments: Iterable[SegmentProgram], kernels: Mapping[str, tvm.tirx.PrimFunc]
) -> tvm.IRModule:
    """Every loop nest that ``segments`` call and all ``kernels``, each public under its name."""
    called = sorted({call.function for segment in segments for call in segment.calls})
    assert not kernels.keys() & set(called), "a loop nest has the name of a kernel"
    functions = {name: module[name] for name in called} | dict(kernels)
    for name in called:
        if ON_HOPPER in module[name].attrs:
            functions |= {
                name: module[name].without_attr(ON_HOPPER),
                name + HOPPER: module[name].attrs[ON_HOPPER],
            }
    public = {name: function.with_attr("global_symbol", name) for name, function in functions.items()}
    return tvm.IRModule({tvm.ir.GlobalVar(name): function for name, function in public.items()})


def export_cpu(module: tvm.IRModule, target: Target, output: Path) -> tuple[Path, ...]:
    """Compile ``module`` with LLVM into one shared library; returns it relative to ``output``."""
    register_cpu_pipeline()
    library = tirx.build(module, host_target(target), pipeline=CPU_PIPELINE)
    library.export_library(str(output / MODULE_NAME), fcompile=link)
    return (Path(MODULE_NAME),)


def import_segments(functions: Mapping[str, Segment], model: ModelRecord) -> tvm.IRModule:
    """All segments in one Relax module, each under its name and with its number of inputs as ``num_input``."""
    inputs = {function.name: len(function.inputs) for function in model.functions}
    imported: dict[Any, Any] = {
        name: import_segment(name, segment.graph_module, model.class_name).with_attr(
            "num_input", inputs[name]
        )
        for name, segment in functions.items()
    }
    return tvm.IRModule(imported)
