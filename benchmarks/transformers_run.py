"""Run transformers end to end in this process and print what it took as JSON; the benchmarks start it as a child.

On a GPU: a static cache, and a decode step captured as one CUDA graph, by each implementation of experts that
transformers has; the fastest counts. On a CPU: its dynamic cache, one call a token.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import torch
import transformers

from benchmarks.work import Work, WorkType

if TYPE_CHECKING:
    from collections.abc import Callable

EXPERTS = {"cuda": ("grouped_mm", "batched_mm"), "cpu": ("eager",)}
WARM_UPS = 3


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--work", "works", type=WorkType(), multiple=True, required=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
def main(model: Path, works: tuple[Work, ...], device: str, repeats: int, threads: int | None) -> None:
    """MODEL is a checkpoint's folder, or one with a ``config.json`` alone: then weights are random."""
    if threads:
        torch.set_num_threads(threads)
    place = torch.device(device)
    network = load(model, place)
    runs: list[dict[str, Any]] = []
    errors: dict[str, str] = {}
    with torch.inference_mode():
        for work in works:
            for experts in EXPERTS[place.type]:
                try:
                    network.set_experts_implementation(experts)
                    runs.append(measure(network, work, repeats, place) | {"experts": experts})
                except (RuntimeError, ValueError, TypeError) as error:
                    errors[f"{work} {experts}"] = str(error)[:300]
    print(json.dumps({"runs": runs, "errors": errors, "versions": versions()}))


def load(model: Path, device: torch.device) -> Any:
    """The model in bfloat16 on ``device``."""
    network: Any
    attention = "sdpa" if device.type == "cuda" else "eager"
    if any(model.glob("*.safetensors")):
        network = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation=attention
        )
        return network.to(device).eval()
    config: Any = transformers.AutoConfig.from_pretrained(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with device:
        network = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    return network.eval()


def versions() -> dict[str, str]:
    """Of what was measured."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def measure(network: Any, work: Work, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of the prompts, and the median of a step."""
    ids = torch.randint(0, network.config.vocab_size, (work.batch, work.prompt_tokens), device=device)
    prefills = []
    for _ in range(repeats + 1):
        before = _now(device)
        network(ids, use_cache=True, logits_to_keep=1)
        prefills.append(_now(device) - before)
    steps = decode(network, ids, work, device)
    return {"work": str(work), "prefill_seconds": median(prefills[1:]), "step_seconds": median(steps)}


def decode(network: Any, ids: torch.Tensor, work: Work, device: torch.device) -> list[float]:
    """Seconds of each step, the token of one being the input of the next."""
    cache: Any = None
    if device.type == "cuda":
        size = work.prompt_tokens + work.new_tokens + 2 * WARM_UPS
        cache = transformers.StaticCache(config=network.config, max_cache_len=size)
    output = network(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    step = make_step(network, output.past_key_values, output.logits[:, -1:].argmax(-1), work.prompt_tokens)
    run = _captured(step) if device.type == "cuda" else step
    seconds = []
    for _ in range(work.new_tokens):
        before = _now(device)
        run()
        seconds.append(_now(device) - before)
    return seconds


def make_step(network: Any, cache: Any, token: torch.Tensor, position: int) -> Callable[[], torch.Tensor]:
    """One greedy step that takes its input from where the one before put it; ``token`` ``[B, 1]``."""
    positions = torch.full_like(token, position)

    def step() -> torch.Tensor:
        logits = network(token, position_ids=positions, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))
        positions.add_(1)
        return token

    return step


def _captured(step: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """The step as a CUDA graph."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
