"""``MoE(checkpoint_or_bundle, config)``: MoE-Infinity's way in, with its options; see docs/from-moe-infinity.md."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.artifacts.files.manifest import MANIFEST_NAME
from moec.artifacts.files.reader import read_manifest
from moec.artifacts.fingerprint import config_sha256
from moec.errors import BundleError, CompileError, DeviceError, MissingDependencyError, RequestError
from moec.runtime.loading.load import load
from moec.runtime.memory.budget import parse_memory
from moec.runtime.routing.ring import DEFAULT_CAPACITY

if TYPE_CHECKING:
    from moec.runtime.model import Model

    Config = Mapping[str, Any] | str | os.PathLike[str] | object

COMPILER_PACKAGES = ("torch", "transformers", "safetensors", "tvm")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """MoE-Infinity's options that moec has; each does what `moec.runtime.load` says of its own."""

    offload_path: str | os.PathLike[str] | None = None
    """Folder for the bundle that is compiled on first use; not needed where a bundle is given."""
    device_memory_ratio: float | None = None
    """``device_memory``: of the GPU's memory, for everything. Nothing to limit where there is no GPU."""
    host_memory_ratio: float | None = None
    """``host_memory``: of the host's memory."""
    prefetch: bool | None = None
    """``prefetch``; ``None``: as the schedule says."""
    trace_path: str | os.PathLike[str] | None = None
    """``trace_path``."""
    trace_capacity: int = DEFAULT_CAPACITY
    """``trace_capacity``: in tokens, not in sequences."""
    num_threads: int | None = None
    """``cpu_threads``."""
    device: str | Sequence[str] | None = None
    """``device``: which GPU, or several whose layers the model is divided into. ``None``: the first one, or the CPU."""


def MoE(checkpoint_or_bundle: str | os.PathLike[str], config: Config = None) -> Model:  # noqa: N802 - as there
    """Load a model, compiling it first where that was not done yet.

    Where the config names no device, the first GPU is used where there is one and the bundle has code for it, otherwise
    the CPU.

    Args:
        checkpoint_or_bundle: a bundle's folder, or a checkpoint's folder or hub id; that is compiled into
            ``offload_path`` on first use, for which moec's compiler must be installed.
        config: a dict, the path of a JSON file, or a dataclass with the fields of `MoEConfig`. A key that it does not
            have is an error; a dataclass may have other fields as long as they are as it makes them by itself.

    Raises:
        RequestError: the config has unknown options, or no ``offload_path`` where one is needed.
        MissingDependencyError: there is something to compile, and no compiler.
        CompileError: compiling failed; its own message is on stderr.
        BundleError: ``offload_path`` has a bundle of another model under this name, or it is damaged.
    """
    options = read_config(config)
    capability = gpu_capability()
    bundle = _bundle(Path(checkpoint_or_bundle), str(checkpoint_or_bundle), options, capability)
    kinds = {target.kind for target in read_manifest(bundle.absolute()).targets}
    usual = "cuda:0" if capability is not None and "cuda" in kinds else "cpu"
    device = options.device or usual
    return load(
        bundle,
        device=device,
        device_memory=None if device == "cpu" else options.device_memory_ratio,
        host_memory=options.host_memory_ratio,
        cpu_threads=options.num_threads,
        trace_path=None if options.trace_path is None else Path(options.trace_path),
        trace_capacity=options.trace_capacity,
        prefetch=options.prefetch,
    )


def read_config(config: Config) -> MoEConfig:
    """A config in any of its forms; raises `RequestError` where it has options that moec has not."""
    if config is None:
        return MoEConfig()
    if isinstance(config, MoEConfig):
        return config
    if isinstance(config, (str, os.PathLike)):
        values: Any = _read_json(Path(config))
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = _changed_fields(config)
    else:
        values = config
    if not isinstance(values, Mapping):
        raise RequestError(
            f"A config of type {type(values).__name__} cannot be read.",
            "It is a dict, the path of a JSON file, or a dataclass.",
            "Give one of these.",
        )
    known = [field.name for field in dataclasses.fields(MoEConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise RequestError(
            f"The config has {', '.join(map(repr, unknown))}, which moec does not know.",
            f"Its options are {', '.join(known)}.",
            "Leave it out; docs/from-moe-infinity.md says what takes its place.",
        )
    options = MoEConfig(**values)
    if options.device_memory_ratio is not None:
        # Here, since without a GPU nothing else looks at it.
        parse_memory(options.device_memory_ratio, sys.maxsize, "device_memory_ratio")
    return options


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RequestError(f"The config {path} cannot be read.", f"{error}.", "Give a JSON file.") from error


def _changed_fields(config: Any) -> dict[str, Any]:
    """The fields of a dataclass but for those that moec does not know and that it makes so by itself."""
    known = {field.name for field in dataclasses.fields(MoEConfig)}
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    try:
        usual = type(config)(**{"offload_path": values["offload_path"]} if "offload_path" in values else {})
    except (TypeError, ValueError):
        return values
    return {name: value for name, value in values.items() if name in known or value != getattr(usual, name)}


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of the first GPU; ``None`` where there is no GPU, driver or cuda-bindings."""
    from moec.runtime.devices.cuda.driver.nvidia import NvidiaDriver

    try:
        driver = NvidiaDriver()
    except (DeviceError, MissingDependencyError):
        return None
    return driver.capability(0) if driver.device_count() else None


def _bundle(path: Path, name: str, options: MoEConfig, capability: tuple[int, int] | None) -> Path:
    """The bundle to load: the one that is named, or the one below ``offload_path``, compiled where it is missing."""
    if (path / MANIFEST_NAME).is_file():
        return path
    if options.offload_path is None:
        raise RequestError(
            f"{name} is no bundle, and there is no offload_path to compile it into.",
            f"It has no {MANIFEST_NAME}.",
            'Give a bundle, or {"offload_path": FOLDER}.',
        )
    bundle = Path(options.offload_path) / f"{path.name}.moec"
    if (bundle / MANIFEST_NAME).is_file():
        _check_same_model(bundle, path, name)
    else:
        compile_into(name, bundle, capability)
    return bundle


def _check_same_model(bundle: Path, checkpoint: Path, name: str) -> None:
    """Raise `BundleError` where the bundle was made of another checkpoint of the same name."""
    config = checkpoint / "config.json"
    if config.is_file():
        made_of = json.loads((bundle / "packing.json").read_bytes())["config_sha256"]
        same = made_of == config_sha256(json.loads(config.read_bytes()))
    else:
        same = read_manifest(bundle.absolute()).model_name == name
    if not same:
        raise BundleError(
            f"{bundle} was compiled from another model than {name}.",
            "Both have the same name.",
            "Give another offload_path, or remove that bundle.",
        )


def compile_into(checkpoint: str, bundle: Path, capability: tuple[int, int] | None) -> None:
    """Run ``moec compile`` for this machine's CPU, and its GPU where it has one.

    Raises:
        MissingDependencyError: the compiler is not installed.
        CompileError: it failed.
    """
    missing = [name for name in COMPILER_PACKAGES if importlib.util.find_spec(name) is None]
    if importlib.util.find_spec("moec.compiler.pipeline") is None or missing:
        raise MissingDependencyError(
            f"{checkpoint} has to be compiled, and moec's compiler is not installed here.",
            f"There is no {', '.join(missing) or 'moec.compiler'}.",
            "Run: pip install 'moec[compile]', or compile it elsewhere and give the bundle.",
        )
    targets = ["--target", "cpu"]
    if capability is not None:
        targets += ["--target", f"cuda-sm_{capability[0]}{capability[1]}"]
    bundle.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "moec", "compile", checkpoint, "-o", str(bundle), *targets]
    code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
    if code != 0:
        raise CompileError(
            f"{checkpoint} could not be compiled.",
            f"`moec compile` ended with exit code {code}; its message is above.",
            f"Run it by itself: moec compile {checkpoint} -o {bundle}",
        )
