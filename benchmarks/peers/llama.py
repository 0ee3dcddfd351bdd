"""llama.cpp with as many layers' experts on the GPU as a budget holds, by `llama_cpp/run.cpp` and a random GGUF."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.peers.gguf_model import file_bytes, tensors, write_gguf

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.support.work import Work

OVERHEAD_BYTES = 280 << 20
"""First guess of what the GPU holds besides weights: cache, buffers, cuBLAS. Not too much: a layer more is tried only
where the first try leaves room for one."""
FLASH_ATTENTION = "Flash Attention enabled"
"""What llama.cpp says when a model is loaded and the GPU has kernels for it."""
TRIES = 3


@dataclass(frozen=True)
class LlamaCpp:
    """The program, and a file of one kind in a folder with room for it."""

    program: Path
    config: dict[str, Any]
    kind: str
    folder: Path
    threads: int
    thread_clock: bool = False
    """Whether times are by the clock of the thread, where there is but one."""

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"random-{self.kind}.gguf"

    def write(self) -> int:
        """Write the file; its bytes."""
        return write_gguf(self.config, self.path, self.kind)

    def best(self, work: Work, budget: int) -> dict[str, Any]:
        """The most layers' experts on the GPU that keep the budget, or the fewest where none does."""
        layers = self.config["num_hidden_layers"]
        dense = self.config["first_k_dense_replace"]
        experts = [file_bytes(tensor, self.kind) for tensor in tensors(self.config) if "_exps" in tensor.name]
        layer = sum(experts) / (layers - dense)
        everything = sum(file_bytes(tensor, self.kind) for tensor in tensors(self.config))
        on_cpu = dense + math.ceil(max(0.0, everything + OVERHEAD_BYTES - budget) / layer)
        tried: dict[int, dict[str, Any]] = {}
        for _ in range(TRIES):
            on_cpu = min(max(on_cpu, dense), layers)
            if on_cpu in tried:
                break
            tried[on_cpu] = self.run(work, on_cpu)
            on_cpu += math.ceil((tried[on_cpu]["gpu_bytes"] - budget) / layer)
        kept = {number: facts for number, facts in tried.items() if facts["gpu_bytes"] <= budget}
        number = min(kept) if kept else max(tried)
        return {"layers on the CPU": number - dense, "budget": budget} | tried[number]

    def run(self, work: Work, on_cpu: int, mode: str = "copy", repeats: int = 1) -> dict[str, Any]:
        """One process.

        Raises:
            RuntimeError: it failed.
        """
        numbers = on_cpu, work.prompt_tokens, work.new_tokens, self.threads
        command = [str(self.program), str(self.path), *map(str, numbers), mode, str(repeats)]
        command += ["thread"] if self.thread_clock else []
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"llama.cpp failed: {done.stderr[-2000:]}")
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return facts | {"flash_attention": FLASH_ATTENTION in done.stderr}
