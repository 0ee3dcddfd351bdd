"""An open bundle: its records, and its weights where they are mapped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.files.traces import TRACES_NAME, load_traces
from moec.artifacts.layout.experts import layout
from moec.artifacts.paths import DENSE_NAME, experts_name

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from moec.artifacts.files.manifest import Manifest, TargetRecord
    from moec.artifacts.files.safetensors import TensorPlace
    from moec.artifacts.ids import LayerId, TensorName
    from moec.artifacts.layout.experts import ExpertLayout
    from moec.artifacts.model import ExpertsLayer, ModelRecord
    from moec.artifacts.packing import PackingRecord
    from moec.artifacts.program import ProgramRecord
    from moec.artifacts.schedule import ScheduleRecord
    from moec.artifacts.traces import Traces


@dataclass(frozen=True)
class Modules:
    """What ``moec compile --modules-only`` makes: everything but weights, traces and schedule."""

    path: Path
    manifest: Manifest
    model: ModelRecord
    packing: PackingRecord
    programs: dict[str, ProgramRecord]
    """By name of the target."""


@dataclass(frozen=True)
class Bundle:
    """An open, verified bundle. Weight files are mapped when first asked for, read-only."""

    path: Path
    manifest: Manifest
    model: ModelRecord
    programs: dict[str, ProgramRecord]
    """By name of the target."""
    schedule: ScheduleRecord
    dense: dict[TensorName, TensorPlace]
    _maps: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict, repr=False, compare=False)

    def target(self, name: str) -> TargetRecord:
        """The compiled target called ``name``; ``KeyError`` where the bundle has none."""
        for target in self.manifest.targets:
            if target.name == name:
                return target
        raise KeyError(name)

    def expert_layout(self, layer: LayerId) -> ExpertLayout:
        """How one expert of this MoE layer is laid out."""
        name = self._experts(layer).body
        return layout(next(body for body in self.model.bodies if body.name == name))

    def experts_view(self, layer: LayerId) -> npt.NDArray[np.uint8]:
        """All experts of a MoE layer: ``[E, stride]`` bytes of the mapped file, page-aligned."""
        stride = self.expert_layout(layer).stride_bytes
        return self._map(experts_name(layer)).reshape(self._experts(layer).experts, stride)

    def expert_view(self, layer: LayerId, expert: int) -> npt.NDArray[np.uint8]:
        """One expert: ``[stride]`` bytes of the mapped file; its parts lie as ``expert_layout`` says."""
        expert_bytes: npt.NDArray[np.uint8] = self.experts_view(layer)[expert]
        return expert_bytes

    def dense_view(self, name: TensorName) -> npt.NDArray[np.uint8]:
        """The bytes of one dense tensor, 64-byte aligned; type and shape are in ``dense``."""
        place = self.dense[name]
        return self._map(DENSE_NAME)[place.offset_bytes : place.offset_bytes + place.size_bytes]

    def traces(self) -> Traces | None:
        """The routing traces, or ``None`` where the bundle was compiled without calibration."""
        return load_traces(self.path / TRACES_NAME) if TRACES_NAME in self.manifest.files else None

    def close(self) -> None:
        """Let go of the mapped files; views handed out keep theirs."""
        self._maps.clear()

    def _experts(self, layer: LayerId) -> ExpertsLayer:
        """A MoE layer by its number in the whole model, of which this may be a section."""
        return next(each for each in self.model.experts if each.layer == layer)

    def _map(self, name: str) -> npt.NDArray[np.uint8]:
        if name not in self._maps:
            empty = self.manifest.files[name].size_bytes == 0
            self._maps[name] = (
                np.zeros(0, np.uint8) if empty else np.memmap(self.path / name, dtype=np.uint8, mode="r")
            )
        return self._maps[name]
