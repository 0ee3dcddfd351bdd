"""The compiled modules for CPUs: choosing a target that this one can run, loading it with TVM's small runtime.

Nothing here imports ``tvm``: its runtime library is loaded by path and reached through ``tvm_ffi``, which
takes 0.2 s where ``import tvm`` takes seconds and brings the compiler in.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.errors import BundleError, DeviceError, MissingDependencyError
from moec.runtime.machine.interface import check_interface
from moec.runtime.machine.threads import use_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moec.artifacts.files.manifest import TargetRecord

_runtime_library: ctypes.CDLL | None = None
_loading = threading.Lock()


def host_cpu_features() -> frozenset[str]:
    """The flags of ``/proc/cpuinfo``; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return frozenset()
    for line in path.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def choose_cpu_target(targets: Sequence[TargetRecord], features: frozenset[str]) -> TargetRecord:
    """The CPU target that needs the most of what this machine has.

    Raises:
        DeviceError: no CPU target runs on a machine with these ``features``.
        BundleError: the one that does was compiled by another moec.
    """
    cpu = [target for target in targets if target.kind == "cpu"]
    fitting = [target for target in cpu if features.issuperset(target.cpu_features)]
    if fitting:
        return check_interface(max(fitting, key=lambda target: len(target.cpu_features)))
    if not cpu:
        names = ", ".join(target.name for target in targets) or "none"
        raise DeviceError(
            "The bundle has no module for a CPU.",
            f"Its targets: {names}.",
            "Compile again with --target cpu.",
        )
    lacking = "; ".join(
        f"{target.name} needs {' '.join(sorted(set(target.cpu_features) - features))}" for target in cpu
    )
    raise DeviceError(
        "This CPU cannot run any module in the bundle.",
        f"It lacks instructions: {lacking}.",
        "Compile again on this machine with --target cpu, or with --target cpu-x86-64-v3.",
    )


def load_runtime(threads: int | None) -> int:
    """Load TVM's runtime library into the process and say how many threads kernels run on.

    Both are shared by all models: the last call decides for all.

    Args:
        threads: see `moec.runtime.machine.threads.use_threads`.

    Raises:
        RequestError: more threads than a pool has that is running already.
        MissingDependencyError: the package ``apache-tvm`` is not installed or has no runtime library.
    """
    global _runtime_library  # noqa: PLW0603
    ffi = import_tvm_ffi()
    if _runtime_library is None:
        package = importlib.util.find_spec("tvm")
        folder = Path(package.origin).parent / "lib" if package and package.origin else None
        path = folder / "libtvm_runtime.so" if folder else None
        if path is None or not path.exists():
            raise MissingDependencyError(
                "TVM's runtime library was not found.",
                "The package apache-tvm is not installed completely.",
                "Install it again: pip install --force-reinstall apache-tvm==0.27.0.post1",
            )
        _runtime_library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    return use_threads(ffi, threads)


def import_tvm_ffi() -> Any:
    """Import ``tvm_ffi`` without the torch that it would import where torch is installed (a second, 200 MB).

    tvm_ffi treats torch as optional. Where torch is already loaded nothing is hidden.
    """
    if "tvm_ffi" in sys.modules or "torch" in sys.modules:
        import tvm_ffi

        return tvm_ffi
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm_ffi
    finally:
        del sys.modules["torch"]
    return tvm_ffi


def load_alone(path: Path) -> Any:
    """Load a shared library that nobody else in the process has; it leaves with the last of its functions.

    One that is there already, since a model has it or somebody still holds a function of a closed one, is not met
    again: it has looked up that model's kernels, and may come of a file that was replaced since. A copy is loaded then.

    Raises:
        DeviceError: it is not made for this kind of machine.
    """
    with _loading:
        if not _is_loaded(path):
            return _load(path)
        # In memory, since code in a folder for temporary files may not be allowed to run; under a name of its own,
        # since the linker goes by names first.
        with os.fdopen(os.memfd_create(path.name), "wb") as copy, tempfile.TemporaryDirectory() as names:
            copy.write(path.read_bytes())
            copy.flush()
            name = Path(names, path.name)
            name.symlink_to(f"/proc/self/fd/{copy.fileno()}")
            return _load(name)


def _is_loaded(path: Path) -> bool:
    """Whether a shared library of this name is in the process."""
    linker = ctypes.CDLL(None)
    linker.dlopen.restype = ctypes.c_void_p
    handle = linker.dlopen(os.fsencode(path), os.RTLD_LAZY | os.RTLD_NOLOAD)
    if handle:
        linker.dlclose(ctypes.c_void_p(handle))
    return bool(handle)


def load_libraries(folder: Path, files: Sequence[str]) -> LibraryFunctions:
    """Load the shared libraries among ``files``, a target's in the bundle ``folder``; raises as `LibraryFunctions`."""
    return LibraryFunctions([folder / name for name in files if name.endswith(".so")])


class LibraryFunctions:
    """The packed functions of shared libraries, by name.

    Raises:
        DeviceError: a library is not made for this kind of machine.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._libraries = [load_alone(path) for path in paths]

    def has(self, name: str) -> bool:
        """Whether there is a function called ``name``."""
        return any(library.implements_function(name, query_imports=True) for library in self._libraries)

    def get(self, name: str) -> Callable[..., Any]:
        """The function called ``name``.

        Raises:
            BundleError: no library has it.
        """
        for library in self._libraries:
            if library.implements_function(name, query_imports=True):
                function: Callable[..., Any] = library.get_function(name, query_imports=True)
                return function
        raise BundleError(
            f"The bundle's modules have no function {name}.",
            "program.json and the modules were not made together.",
            "Compile the model again.",
        )


def _load(path: Path) -> Any:
    import tvm_ffi

    try:
        return tvm_ffi.load_module(str(path), keep_module_alive=False)
    except RuntimeError as error:
        raise DeviceError(
            f"The module {path.name} cannot be loaded on this machine.",
            f"{str(error).splitlines()[0][-300:]}.",
            "It was made for another kind of machine: compile again on one like this.",
        ) from error
