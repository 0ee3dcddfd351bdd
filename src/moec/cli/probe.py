"""The compiler's calibration runs, done by the runtime: the one place where the two rooms meet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.errors import DeviceError

if TYPE_CHECKING:
    from pathlib import Path

    from moec.artifacts.files.manifest import TargetRecord
    from moec.artifacts.traces import Traces
    from moec.compiler.profiling.calibration import Prompt
    from moec.runtime import Model

GENERATED_TOKENS = 32
"""Tokens drawn after each calibration prompt, so that decode is profiled too."""


class RuntimeProbe:
    """Runs prompts through a bundle and records which experts they choose."""

    def can_run(self, targets: tuple[TargetRecord, ...]) -> bool:
        """Whether this machine's CPU runs one of ``targets``."""
        from moec.runtime.machine.libraries import choose_cpu_target, host_cpu_features

        try:
            choose_cpu_target(targets, host_cpu_features())
        except DeviceError:
            return False
        return True

    def run(self, bundle: Path, prompts: tuple[Prompt, ...] | None) -> Traces:
        """Traces of the prompts, or of the shipped ones, or of random tokens where there is no tokenizer."""
        from moec import runtime
        from moec.compiler.profiling.calibration import DEFAULT_PROMPTS, random_prompts, read_prompts

        with runtime.load(bundle, verify="sizes") as model:
            if prompts is None:
                shipped = read_prompts(DEFAULT_PROMPTS)
                prompts = shipped if model.has_tokenizer else random_prompts(model.record)
            return model.trace(
                [_token_ids(model, prompt) for prompt in prompts],
                max_new_tokens=min(GENERATED_TOKENS, model.record.max_context // 2),
            )


def _token_ids(model: Model, prompt: Prompt) -> list[int]:
    ids = model.encode(prompt.text or "") if prompt.token_ids is None else list(prompt.token_ids)
    return ids[: model.record.max_context // 2]
