"""A CUDA module as files that hold machine code only: the host's library, a fat binary, and what launches it."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.build import split_host_device_mods
from tvm_ffi.serialization import from_json_graph_str, to_json_graph_str

from moec.compiler.kernels.cuda.primitives import HEADER
from moec.compiler.kernels.emit import HAND_WRITTEN
from moec.compiler.lowering.cuda_kernels import finish_kernels, lower_kernels
from moec.compiler.lowering.fatbin import FatbinEntry, write_fatbin
from moec.compiler.lowering.link import link
from moec.compiler.lowering.nvrtc import compile_cubin, compile_ptx
from moec.compiler.lowering.tvm_targets import cuda_target, host_target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.lowering.targets import Target

HOST_NAME, FATBIN_NAME, KERNELS_NAME = "host.so", "kernels.fatbin", "kernels.json"

KERNEL = 'extern "C" __global__'
DEFINITION = re.compile(
    r" void (?:__launch_bounds__\([^)]*\) )?(?P<name>\w+)\([^;{]*\) \{(?P<body>.*)", re.DOTALL
)
FEATURES = {"sm_90": "sm_90a"}
"""Compiled with the features that one architecture alone has: all GPUs of its number have them."""
ONLY_HOPPER = "#if defined(__CUDA_ARCH_FEAT_SM90_ALL)"
DYNAMIC_MEMORY = "tirx.use_dyn_shared_memory"
EARLY_LAUNCH = "tirx.use_programtic_dependent_launch"
"""TVM's words for launch parameters; the first must come last."""

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
    host, code = split_kernels(module, target)
    host.export_library(str(output / HOST_NAME), fcompile=link)
    write_fatbin(output / FATBIN_NAME, _machine_code(code.source, target))
    record = {"tvm_version": tvm.__version__, "func_info": code.functions}
    (output / KERNELS_NAME).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return Path(HOST_NAME), Path(FATBIN_NAME), Path(KERNELS_NAME)


def split_kernels(module: tvm.IRModule, target: Target) -> tuple[tvm.runtime.Module, DeviceCode]:
    """The host's compiled module, and the CUDA source of everything that runs on the GPU."""
    lower_loops, finish_host, finish_device = tirx.get_tir_pipeline("default")
    generated, written = _by_origin(tirx.transform.BindTarget(cuda_target(target))(module))
    host, loops = split_host_device_mods(lower_loops(generated))
    host_written, kernels = split_host_device_mods(lower_kernels(written))
    device = tvm.IRModule({})
    for group in loops.values():
        device.update(finish_device()(group))
    for group in kernels.values():
        host_written, distinct = share_kernels(host_written, group)
        device.update(finish_kernels(distinct))
    host.update(host_written)
    where = next(iter((*loops, *kernels)))
    with _source_instead_of_code():
        built = tvm.get_global_func("target.build.cuda")(device, where)
    # Without the promise that nothing else writes to a tensor: a load could else move above `wait_previous`.
    source = _each_kernel(built.inspect_source()).replace(" __restrict__", "")
    code = DeviceCode(source, _function_table(device, source))
    return tvm.get_global_func("target.build.llvm")(finish_host()(host), host_target(target)), code


def share_kernels(host: tvm.IRModule, kernels: tvm.IRModule) -> tuple[tvm.IRModule, tvm.IRModule]:
    """Host functions that launch one kernel where there were several alike, and what is left of the kernels.

    The way of few tokens is the same for Hopper GPUs and for all.
    """
    first: dict[int, str] = {}
    instead: dict[str, str] = {}
    kept: dict[Any, Any] = {}
    for variable, kernel in sorted(kernels.functions_items(), key=lambda item: str(item[0].name_hint)):
        name = str(kernel.attrs["global_symbol"])
        digest = tvm_ffi.structural_hash(kernel.without_attr("global_symbol"), map_free_vars=True)
        if first.setdefault(digest, name) == name:
            kept[variable] = kernel
        else:
            instead[name] = first[digest]
    if not instead:
        return host, kernels
    # Launches name their kernels by strings, and nothing in Python rewrites those inside a function.
    text = re.sub(r'"(\w+)"', lambda found: f'"{instead.get(found[1], found[1])}"', to_json_graph_str(host))
    return from_json_graph_str(text), tvm.IRModule(kept)


def _each_kernel(source: str) -> str:
    """What TVM's code generator cannot say, kernel by kernel: bounds on registers, names, what is Hopper's alone.

    Dynamic shared memory is declared ``extern`` under the name of a variable: two kernels may not give one name to
    memory of two types.
    """
    head, *kernels = source.split(KERNEL)
    for number, kernel in enumerate(kernels):
        blocks = re.search(r"moec_blocks_at_once\((\d+)\);", kernel)
        if blocks is not None:
            bounds = rf"__launch_bounds__(\1, {blocks[1]})"
            kernel = re.sub(r"__launch_bounds__\((\d+)\)", bounds, kernel, count=1)  # noqa: PLW2901
        memory = re.search(r"extern __shared__ __align__\(\d+\) \w+ (\w+)\[\];", kernel)
        if memory is not None:
            kernel = re.sub(rf"\b{memory[1]}\b", f"{memory[1]}_of_{number}", kernel)  # noqa: PLW2901
        if "moec_wgmma" in kernel:  # elsewhere nobody calls it
            begin, end = kernel.index("{") + 1, kernel.rindex("}")
            body = kernel[begin:end]
            kernel = f"{kernel[:begin]}\n{ONLY_HOPPER}\n{body}\n#endif\n{kernel[end:]}"  # noqa: PLW2901
        kernels[number] = kernel
    return KERNEL.join((head, *kernels))


def _by_origin(module: tvm.IRModule) -> tuple[tvm.IRModule, tvm.IRModule]:
    """Functions whose loops TVM generated, and those that were written by hand."""
    groups: tuple[dict[Any, Any], dict[Any, Any]] = {}, {}
    for name, function in module.functions_items():
        groups[bool(function.attrs.get(HAND_WRITTEN, False))][name] = function
    generated, written = (tvm.IRModule(group) for group in groups)
    return generated, written


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


def _function_table(module: tvm.IRModule, source: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    bodies = _bodies(source)
    for name, function in module.functions_items():
        symbol = str(function.attrs.get("global_symbol", name.name_hint))
        tags = [str(tag) for tag in function.attrs.get("tirx.kernel_launch_params", [])]
        if _waits(bodies[symbol]):
            tags.insert(len(tags) - (DYNAMIC_MEMORY in tags), EARLY_LAUNCH)
        table[symbol] = {
            "name": symbol,
            "arg_types": [_argument_type(parameter) for parameter in function.params],
            "launch_param_tags": tags,
        }
    return table


def _bodies(source: str) -> dict[str, str]:
    """The body of each kernel by its name; some are declared before."""
    parts = (DEFINITION.match(part) for part in source.split(KERNEL)[1:])
    return {found["name"]: found["body"] for found in parts if found is not None}


def _waits(body: str) -> bool:
    """Whether a kernel itself waits for what it needs of the one before it, so that it can be launched early."""
    return "moec_wait_previous()" in body or "moec_wait_count(" in body


def _argument_type(parameter: Any) -> str:
    return str(parameter.ty.dtype) if isinstance(parameter.ty, tvm.ir.PrimType) else "handle"


def _machine_code(source: str, target: Target) -> list[FatbinEntry]:
    text = PREAMBLE + HEADER.read_text() + source
    newest = target.architectures[-1]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC works outside of Python's lock
        ptx = pool.submit(compile_ptx, text, newest)
        cubins = pool.map(lambda name: compile_cubin(text, FEATURES.get(name) or name), target.architectures)
        entries = [
            FatbinEntry("elf", name, code) for name, code in zip(target.architectures, cubins, strict=True)
        ]
    return [*entries, FatbinEntry("ptx", newest, ptx.result())]
