"""A CUDA target's module: machine code for the GPU, and the host functions that launch it."""

from __future__ import annotations

import json
import weakref
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from moec.artifacts.files.stamps import file_states
from moec.artifacts.program import HOPPER
from moec.errors import BundleError
from moec.runtime.devices.cuda.modules.architecture import EARLY_LAUNCH_CAPABILITY
from moec.runtime.machine.libraries import load_alone

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.artifacts.files.stamps import FileState

EARLY_LAUNCH = "tirx.use_programtic_dependent_launch"
"""TVM's tag (and spelling) of a kernel that may be launched before the one in front of it has ended."""

HOPPER_CAPABILITY = (9, 0)

_loaded: weakref.WeakValueDictionary[
    tuple[Path, tuple[tuple[str, FileState], ...], tuple[int, int]], CudaFunctions
] = weakref.WeakValueDictionary()
"""While somebody uses them; a bundle that was compiled again in the same place has others."""


def load_functions(folder: Path, files: tuple[str, ...], capability: tuple[int, int]) -> CudaFunctions:
    """The functions of a target, loaded once however many models use them.

    Raises:
        BundleError: a file is missing.
    """
    key = folder.resolve(), tuple(file_states(folder, files).items()), capability
    functions = _loaded.get(key)
    if functions is None:
        functions = _loaded[key] = CudaFunctions(folder, files, capability)
    return functions


class CudaFunctions:
    """The functions of one CUDA target (see `moec.runtime.device.Functions`).

    The GPU's module is imported into the host's, which is where host functions look their kernels up: once, and then
    they remember where each is. So a host library that is in the process already, be it for a GPU of another capability
    or because somebody still has one function of a closed model, is not met again: a copy of it is loaded.

    Args:
        folder: the bundle.
        files: the target's, relative to ``folder``: one host library, one fat binary, one table of kernels.
        capability: the GPU's compute capability.

    Raises:
        BundleError: a file is missing.
        DeviceError: the host library is not made for this kind of machine.
    """

    def __init__(self, folder: Path, files: Sequence[str], capability: tuple[int, int]) -> None:
        import tvm_ffi

        library, machine_code, table = (
            _only(files, name) for name in ("host.so", "kernels.fatbin", "kernels.json")
        )
        self._own = (HOPPER, "") if capability == HOPPER_CAPABILITY else ("",)
        described = launch_table(json.loads((folder / table).read_text()), capability)
        functions = tvm_ffi.get_global_func("runtime.LoadMetaDataFromJSON")(json.dumps(described))
        create = tvm_ffi.get_global_func("ffi.Module.create.cuda")
        self._host: Any = load_alone(folder / library)
        self._host.import_module(create((folder / machine_code).read_bytes(), "fatbin", functions, {}))

    def has(self, name: str) -> bool:
        """Whether there is a function called ``name``."""
        return bool(self._host.implements_function(name))

    def get(self, name: str) -> Callable[..., Any]:
        """The packed function called ``name``, or the one that takes its place on a GPU of this kind.

        Raises:
            BundleError: the module has none.
        """
        name = next((name + end for end in self._own if self.has(name + end)), name)
        try:
            function: Callable[..., Any] = self._host.get_function(name)
        except AttributeError as error:
            raise BundleError(
                f"The bundle's CUDA module has no function {name}.",
                "model.json and the module were not made together.",
                "Compile the model again.",
            ) from error
        return function


def launch_table(table: dict[str, Any], capability: tuple[int, int]) -> dict[str, Any]:
    """``kernels.json`` for a GPU of this capability: one that cannot launch kernels early must not be asked to."""
    if capability >= EARLY_LAUNCH_CAPABILITY:
        return table
    functions = {
        name: facts
        | {"launch_param_tags": [tag for tag in facts["launch_param_tags"] if tag != EARLY_LAUNCH]}
        for name, facts in table["func_info"].items()
    }
    return table | {"func_info": functions}


def _only(files: Sequence[str], name: str) -> str:
    for file in files:
        if PurePosixPath(file).name == name:
            return file
    raise BundleError(
        f"The bundle's CUDA target has no {name}.",
        f"It has {', '.join(files) or 'no files'}.",
        "Compile the model again.",
    )
