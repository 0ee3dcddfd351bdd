"""CUDA kernels on the CPU: the generated source compiled with g++ beside ``emulator.h``, under the real host code."""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm import tirx

from moec.compiler.lowering.cuda_module import split_kernels
from moec.compiler.lowering.targets import parse_target
from moec.runtime.tensors import tensor_at
from tests.support.made_once import made_once

FOLDER = Path(__file__).parent
HEADER = FOLDER / "emulator.h"
OPTIONS = (
    *("-std=c++17", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"),
    *("-w", "-fPIC"),
)
LIBRARY = "kernels.so"
OBJECT = "emulator.o"
"""The emulator itself, which is in every library: it is compiled once, for speed."""
CUDA_DEVICE = 2
SET_DEVICE = "__tvm_set_device"
"""What host code calls before it launches a kernel: there is no device here."""
_TYPES: dict[str, Any] = {
    "int64": ctypes.c_int64,
    "int32": ctypes.c_int32,
    "float32": ctypes.c_float,
    "handle": ctypes.c_void_p,
}
_DECLARATION = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([\d, ]+\) )?(\w+)\((.*?)\) \{')


class Emulated:
    """Packed functions whose kernels run in the emulator; tensors are numpy arrays, bfloat16 as uint16 bits."""

    def __init__(self, *functions: tirx.PrimFunc) -> None:
        named = {str(function.attrs["global_symbol"]): function for function in functions}
        host, code = split_kernels(tvm.IRModule(named), parse_target("cuda-sm_80"))
        self._library = ctypes.CDLL(str(compile_kernels(code.source)))
        self._host = host
        self._code = code

    def __call__(self, name: str, *arguments: NDArray[Any] | tuple[NDArray[Any], str] | None) -> None:
        """Call ``name``; a pair is an array of bits and the dtype that they stand for; ``None`` is left out."""
        tensors = [_tensor(argument) for argument in arguments if argument is not None]
        found = {kernel: self._launcher(kernel, facts) for kernel, facts in self._code.functions.items()}
        set_device = tvm_ffi.get_global_func(SET_DEVICE)
        for kernel, launch in {**found, SET_DEVICE: lambda *_: None}.items():
            tvm_ffi.register_global_func(kernel, launch, override=True)
        try:
            self._host[name](*tensors)
        finally:
            tvm_ffi.register_global_func(SET_DEVICE, set_device, override=True)
            for kernel in found:
                tvm_ffi.registry.remove_global_func(kernel)

    def _launcher(self, kernel: str, facts: dict[str, Any]) -> Callable[..., None]:
        types = [_TYPES[kind] for kind in facts["arg_types"]]
        tags = [tag for tag in facts["launch_param_tags"] if not tag.startswith("tirx.use_prog")]
        function = self._library[f"emulate_{kernel}"]

        def launch(*values: Any) -> None:
            own, sizes = values[: len(types)], dict(zip(tags, values[len(types) :], strict=True))
            packed = [kind(_plain(value)) for kind, value in zip(types, own, strict=True)]
            places = (ctypes.c_void_p * len(packed))(*(ctypes.addressof(item) for item in packed))
            grid = (ctypes.c_int64 * 3)(*(int(sizes.get(f"blockIdx.{axis}", 1)) for axis in "xyz"))
            function(places, grid, int(sizes["threadIdx.x"]))

        return launch


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, ctypes.c_void_p) else value


def _tensor(argument: NDArray[Any] | tuple[NDArray[Any], str]) -> Any:
    array, dtype = argument if isinstance(argument, tuple) else (argument, str(argument.dtype))
    assert array.flags.c_contiguous
    return tensor_at(array.ctypes.data, dtype, array.shape, device=(CUDA_DEVICE, 0))


def compile_kernels(source: str, optimization: str = "-O0") -> Path:
    """A library that has ``emulate_<kernel>(arguments, grid, threads)`` and the arguments' ``sizes_<kernel>``."""
    name = f"kernels{optimization}-{hashlib.sha256(source.encode()).hexdigest()}"
    return made_once(name, lambda folder: _compile(source, optimization, folder)) / LIBRARY


def _compile(source: str, optimization: str, folder: Path) -> None:
    source = source[source.index('extern "C" __global__') :]
    source = re.sub(
        r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];", r"\1 *\2 = (\1 *)emulated_dynamic;", source
    )
    source = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 static", source)
    wrappers = []
    for name, parameters in _DECLARATION.findall(source):
        kinds = [parameter.strip().rsplit(" ", 1)[0] for parameter in parameters.split(",")]
        plain = [kind.replace("__restrict__", "") for kind in kinds]
        loads = ", ".join(f"*({kind}*)places[{i}]" for i, kind in enumerate(plain))
        wrappers.append(
            f"static void body_{name}(void *all) {{ void **places = (void **)all; {name}({loads}); }}\n"
            f'extern "C" void emulate_{name}(void **places, const int64_t *grid, int threads) '
            f"{{ moec_emulate(body_{name}, places, grid, threads); }}\n"
            f'extern "C" const int sizes_{name}[] = {{ {", ".join(f"sizeof({kind})" for kind in plain)}, 0 }};'
        )
    text = "\n".join((f'#include "{HEADER}"', source, *wrappers))
    emulator = made_once("emulator", _compile_emulator) / OBJECT
    output = ("-o", str(folder / LIBRARY))
    _run_compiler("-shared", optimization, str(emulator), "-x", "c++", "-", *output, source=text)


def _compile_emulator(folder: Path) -> None:
    sources = [str(FOLDER / "fibers.cpp"), str(FOLDER / "primitives.cpp")]
    _run_compiler("-O2", "-r", "-nostdlib", *sources, "-o", str(folder / OBJECT))


def _run_compiler(*arguments: str, source: str = "") -> None:
    result = subprocess.run(["g++", *OPTIONS, *arguments], input=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
