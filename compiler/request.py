"""What the person asked for, and what the stages need of the world outside the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from moec.artifacts.files.manifest import TargetRecord
    from moec.artifacts.machine import MachineRecord
    from moec.artifacts.quantization import Quantization
    from moec.artifacts.traces import Traces
    from moec.compiler.packing import Progress
    from moec.compiler.profiling.calibration import Prompt


class Log(Protocol):
    """Where stages report to; the command line's prints to stderr."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Enter when a stage begins, leave when it ends."""
        ...

    def note(self, text: str) -> None:
        """One thing worth knowing."""
        ...


class Probe(Protocol):
    """Runs calibration prompts through a bundle; the command line passes one that uses the runtime."""

    def can_run(self, targets: tuple[TargetRecord, ...]) -> bool:
        """Whether this machine can run one of them."""
        ...

    def run(self, bundle: Path, prompts: tuple[Prompt, ...] | None) -> Traces:
        """Routing traces; ``None``: the shipped prompts, or random tokens where there is no tokenizer."""
        ...


@dataclass(frozen=True)
class Calibration:
    """How to profile routing."""

    enabled: bool = True
    """Off: every expert is taken to be used alike."""
    prompts: tuple[Prompt, ...] | None = None
    """``None``: the shipped prompts, or random tokens where there is no tokenizer."""


@dataclass(frozen=True)
class FitRequest:
    """What ``--fit`` asks for: a size, or a time on a machine."""

    text: str
    """As the person gave it."""
    limit_bytes: int | None = None
    """Everything resident in so many bytes."""
    milliseconds: float | None = None
    """A decoded token, by the cost model."""
    machine: MachineRecord | None = None
    """Where there is a time."""


@dataclass(frozen=True)
class CompileRequest:
    """One call of ``moec compile``."""

    model: str
    output: Path
    targets: tuple[str, ...]
    calibration: Calibration
    dtype: str | None = None
    """``None``: the checkpoint's own."""
    max_context: int | None = None
    """Tokens; ``None``: the checkpoint's own."""
    modules_only: bool = False
    force: bool = False
    dump_ir: Path | None = None
    onnx: Path | None = None
    tokenizer: Path | None = None
    """A folder whose tokenizer is taken; ``None``: the checkpoint's own."""
    quantization: Quantization | None = None
    """``None``: what the checkpoint has is kept, where the kernels of all targets take it."""
    method: str | None = None
    """In ``moec.formats.METHODS``: what makes codes, instead of what the policy says."""
    fit: FitRequest | None = None
    """Choose formats for a target; then ``quantization`` is ``None``."""


@dataclass(frozen=True)
class Surroundings:
    """The world outside the model."""

    log: Log
    progress: Progress
    probe: Probe
    machines: tuple[MachineRecord, ...]
    """What to make schedules for."""
