"""CUDA modules for tests: made of a few kernels, for the stub or for a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from moec.compiler.kernels.cuda.primitives import launch, launch_next, wait_previous
from moec.compiler.kernels.emit import Argument, arguments, build, i64, load, store, symbol, when
from moec.compiler.lowering.cuda_module import FATBIN_NAME, HOST_NAME, KERNELS_NAME, split_kernels
from moec.compiler.lowering.link import link
from moec.compiler.lowering.targets import parse_target
from tests.support.cuda_stub.images import write_image

FILES = (HOST_NAME, FATBIN_NAME, KERNELS_NAME)
THREADS = 64


def add_one(name: str = "add_one", addend: float = 1.0) -> tirx.PrimFunc:
    """``add_one(x [N] f32, out [N] f32)``, launched early; or a function that adds another number."""

    def body() -> None:
        count = symbol("N")
        x, out = arguments(Argument("x", (count,), "float32"), Argument("out", (count,), "float32"))
        blocks = (count + i64(THREADS - 1)) // i64(THREADS)
        with launch((blocks,), THREADS) as (numbers, thread):
            wait_previous()
            place = T.bind(i64(numbers[0]) * i64(THREADS) + i64(thread))
            with when(place < count):
                store(out, place, load(x, place) + T.float32(addend))
            launch_next()

    return build(name, body)


def write_emulated(folder: Path, *functions: tirx.PrimFunc) -> None:
    """A CUDA target's files whose machine code is the emulator's."""
    named = {str(function.attrs["global_symbol"]): function for function in functions}
    host, code = split_kernels(tvm.IRModule(named), parse_target("cuda-sm_80"))
    host.export_library(str(folder / HOST_NAME), fcompile=link)
    write_image(folder / FATBIN_NAME, code.source)
    (folder / KERNELS_NAME).write_text(json.dumps({"func_info": code.functions}))
