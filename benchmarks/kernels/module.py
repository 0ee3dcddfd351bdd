"""A compiled module whose packed functions are called on torch's tensors, on the CPU or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moec.artifacts.files.reader import read_manifest
from moec.artifacts.files.records import read_record
from moec.artifacts.model import ModelRecord
from moec.artifacts.paths import program_name
from moec.artifacts.program import ProgramRecord
from moec.runtime.devices.cpu import CpuDevice
from moec.runtime.machine.libraries import choose_cpu_target, host_cpu_features, load_runtime
from moec.runtime.tensors import tensor_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from moec.artifacts.files.manifest import TargetRecord
    from moec.runtime.device import Functions

DLPACK_DEVICES = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True, eq=False)
class Module:
    """One target of a bundle, or of what ``moec compile --modules-only`` made; weights are not needed."""

    name: str
    device: torch.device
    model: ModelRecord
    program: ProgramRecord
    functions: Functions

    def bind(self, function: str, *tensors: torch.Tensor, tokens: int) -> Callable[[], None]:
        """A call of a packed function on contiguous tensors, with workspace of its own where it needs one."""
        packed = self.functions.get(function)
        held = list(tensors)
        for workspace in self.program.workspaces:
            if workspace.function == function:
                held.insert(
                    -1, torch.empty(max(1, workspace.at(tokens)), dtype=torch.uint8, device=self.device)
                )
        views = [view(tensor) for tensor in held]

        def call() -> None:
            packed(*views)

        call.held = held  # type: ignore[attr-defined]
        return call


def view(tensor: torch.Tensor) -> Any:
    """A ``tvm_ffi.Tensor`` over a torch tensor's memory, which must live longer."""
    assert tensor.is_contiguous()
    place = DLPACK_DEVICES[tensor.device.type], tensor.device.index or 0
    return tensor_at(tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), place)


def open_module(folder: Path, device: torch.device) -> Module:
    """Load the target of ``folder`` that suits ``device``.

    Raises:
        BundleError: it is damaged.
        DeviceError: none of its targets runs there.
    """
    manifest = read_manifest(folder)
    load_runtime(None)
    load = _load_cuda if device.type == "cuda" else _load_cpu
    target, functions = load(folder, manifest.targets, device)
    model = read_record(ModelRecord, "model", folder / "model.json")
    program = read_record(ProgramRecord, "program", folder / program_name(target.name))
    return Module(folder.name, device, model, program, functions)


def _load_cpu(
    folder: Path, targets: tuple[TargetRecord, ...], _device: torch.device
) -> tuple[TargetRecord, Functions]:
    target = choose_cpu_target(targets, host_cpu_features())
    return target, CpuDevice().load(folder, target.files)


def _load_cuda(
    folder: Path, targets: tuple[TargetRecord, ...], device: torch.device
) -> tuple[TargetRecord, Functions]:
    from moec.runtime.devices.cuda.modules.architecture import choose_cuda_target
    from moec.runtime.devices.cuda.modules.libraries import load_cuda_libraries
    from moec.runtime.devices.cuda.modules.module import load_functions

    load_cuda_libraries()
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    target = choose_cuda_target(targets, capability, name, host_cpu_features())
    return target, load_functions(folder, target.files, capability)
