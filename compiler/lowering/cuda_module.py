"""A CUDA module as files that hold machine code only: the host's library, a fat binary, and what launches it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.build import split_host_device_mods

from moec.compiler.lowering.fatbin import FatbinEntry, write_fatbin
from moec.compiler.lowering.link import link
from moec.compiler.lowering.nvrtc import compile_cubin, compile_ptx
from moec.compiler.lowering.tvm_targets import cuda_target, host_target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.lowering.targets import Target

HOST_NAME, FATBIN_NAME, KERNELS_NAME = "host.so", "kernels.fatbin", "kernels.json"

PREAMBLE = """#include <cuda/std/cstdint>
#include <cuda/std/limits>
using cuda::std::uint8_t;
using cuda::std::uint16_t;
using cuda::std::uint32_t;
using cuda::std::uint64_t;
using cuda::std::int8_t;
using cuda::std::int16_t;
using cuda::std::int32_t;
using cuda::std::int64_t;
#ifndef INFINITY
#define INFINITY (::cuda::std::numeric_limits<float>::infinity())
#endif
"""
"""What a host compiler's headers would declare, and NVRTC has none of."""


@dataclass(frozen=True)
class DeviceCode:
    """The GPU's side of a module before it is compiled."""

    source: str
    functions: dict[str, Any]
    """For each kernel, what TVM's runtime needs to launch it: argument types and launch parameters."""


def export_cuda(module: tvm.IRModule, target: Target, output: Path) -> tuple[Path, ...]:
    """Compile ``module`` into ``output``.

    At load, ``ffi.Module.create.cuda(fat binary, "fatbin", functions, {})`` makes the device module that the library
    inside ``host.so`` imports; ``runtime.LoadMetaDataFromJSON`` reads ``kernels.json`` into ``functions``.

    Args:
        module: PrimFuncs with GPU threads, public under their names.
        target: a ``cuda`` target.
        output: an existing folder.

    Returns:
        The files, relative to ``output``.
    """
    host, code = _split(module, target)
    host.export_library(str(output / HOST_NAME), fcompile=link)
    write_fatbin(output / FATBIN_NAME, _machine_code(code.source, target))
    record = {"tvm_version": tvm.__version__, "func_info": code.functions}
    (output / KERNELS_NAME).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return Path(HOST_NAME), Path(FATBIN_NAME), Path(KERNELS_NAME)


def _split(module: tvm.IRModule, target: Target) -> tuple[tvm.runtime.Module, DeviceCode]:
    """The host's compiled module, and the CUDA source of everything that runs on the GPU."""
    device_target = cuda_target(target)
    lower, finish_host, finish_device = tirx.get_tir_pipeline("default")
    module = lower(tirx.transform.BindTarget(device_target)(module))
    host_module, device_modules = split_host_device_mods(module)
    host = tvm.get_global_func("target.build.llvm")(finish_host()(host_module), host_target(target))
    sources: list[str] = []
    functions: dict[str, Any] = {}
    with _source_instead_of_code():
        for found_target, device_module in device_modules.items():
            finished = finish_device()(device_module)
            sources.append(tvm.get_global_func("target.build.cuda")(finished, found_target).inspect_source())
            functions |= _function_table(finished)
    return host, DeviceCode("\n".join(sources), functions)


@contextmanager
def _source_instead_of_code() -> Iterator[None]:
    """Where a driver is installed TVM would compile for its GPU at once: let it keep the source instead."""
    name = "tvm_callback_cuda_compile"
    callback = tvm.get_global_func(name, allow_missing=True)
    tvm_ffi.register_global_func(name, lambda source: source.encode(), override=True)
    try:
        yield
    finally:
        tvm_ffi.registry.remove_global_func(name)
        if callback is not None:
            tvm_ffi.register_global_func(name, callback, override=True)


def _function_table(module: tvm.IRModule) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, function in module.functions_items():
        symbol = str(function.attrs.get("global_symbol", name.name_hint))
        table[symbol] = {
            "name": symbol,
            "arg_types": [_argument_type(parameter) for parameter in function.params],
            "launch_param_tags": [str(tag) for tag in function.attrs.get("tirx.kernel_launch_params", [])],
        }
    return table


def _argument_type(parameter: Any) -> str:
    return str(parameter.ty.dtype) if isinstance(parameter.ty, tvm.ir.PrimType) else "handle"


def _machine_code(source: str, target: Target) -> list[FatbinEntry]:
    text = PREAMBLE + source
    entries = [FatbinEntry("elf", name, compile_cubin(text, name)) for name in target.architectures]
    newest = target.architectures[-1]
    return [*entries, FatbinEntry("ptx", newest, compile_ptx(text, newest))]
