"""transformers with accelerate's offload under a budget, on random weights of a config's shape; JSON as its last line.

    python -m benchmarks.peers.accelerate_run benchmarks/configs/deepseek-v2-lite.json --budget 8GiB --work 1x512+8

Modules that do not fit ``max_memory`` stay in host memory; accelerate's hooks bring their weights to the GPU for each
call. A run of a few tokens is enough: every step moves the same weights.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import accelerate
import click
import torch
import transformers

from benchmarks.random_weights.values import RandomPool
from benchmarks.support.transformers_run import make_step
from benchmarks.support.work import Work, WorkType
from moec.runtime.memory.budget import parse_memory

POOL_VALUES = 16_777_213
"""The largest prime below 2**24."""


@click.command()
@click.argument("config", type=click.Path(exists=True, path_type=Path))
@click.option("--budget", required=True)
@click.option("--work", type=WorkType(), default=Work(1, 512, 8))
def main(config: Path, budget: str, work: Work) -> None:
    """Run CONFIG's shape."""
    start = time.perf_counter()
    network = offloaded(config, parse_memory(budget, 0, "--budget"))
    loaded = time.perf_counter() - start
    ids = torch.randint(0, network.config.vocab_size, (work.batch, work.prompt_tokens), device="cuda")
    prompts, steps = [], []
    with torch.inference_mode():
        for _ in range(2):
            before = time.perf_counter()
            output = network(ids, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(-1).to("cuda")
            torch.cuda.synchronize()
            prompts.append(time.perf_counter() - before)
        step = make_step(network, output.past_key_values, token, work.prompt_tokens)
        for _ in range(work.new_tokens):
            before = time.perf_counter()
            step()
            torch.cuda.synchronize()
            steps.append(time.perf_counter() - before)
    facts = {
        "load_seconds": loaded,
        "first_token_seconds": min(prompts),
        "step_seconds": median(steps),
        "gpu_bytes": torch.cuda.max_memory_allocated(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, accelerate)},
    }
    print(json.dumps(facts))


def offloaded(config: Path, budget: int) -> Any:
    """The model with as many modules on the GPU as accelerate puts there under ``budget``."""
    facts: Any = transformers.AutoConfig.from_pretrained(config)
    with torch.device("meta"):
        network: Any = transformers.AutoModelForCausalLM.from_config(
            facts, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    places = accelerate.infer_auto_device_map(
        network,
        max_memory={0: budget, "cpu": 1 << 40},
        no_split_module_classes=list(network._no_split_modules),
    )
    network.to_empty(device="cpu")
    fill(network)
    network.set_experts_implementation("grouped_mm")
    return accelerate.dispatch_model(network.eval(), places)


def fill(network: Any) -> None:
    """Random weights; norms are 1; what positions turn by is computed anew."""
    pool = torch.from_numpy(RandomPool("bfloat16", POOL_VALUES).values).view(torch.bfloat16)
    for name, parameter in network.named_parameters():
        flat = parameter.data.view(-1)
        if "norm" in name:
            flat.fill_(1)
            continue
        for first in range(0, flat.numel(), POOL_VALUES):
            part = flat[first : first + POOL_VALUES]
            part.copy_(pool[: part.numel()])
    for name, buffer in network.named_buffers():
        buffer.data.zero_()
        if name.endswith("inv_freq"):
            owner = network.get_submodule(name.rpartition(".")[0])
            fresh = type(owner)(network.config)
            buffer.data.copy_(getattr(fresh, name.rpartition(".")[2]))


if __name__ == "__main__":
    main()
