"""Run transformers end to end in this process and print what it took as JSON; the benchmarks start it as a child.

On a GPU: a static cache, and a decode step captured as one CUDA graph, by each implementation of experts that
transformers has; the fastest counts. On a CPU: its dynamic cache, one call a token.
"""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import torch
import transformers

from benchmarks.support.work import Work, WorkType

if TYPE_CHECKING:
    from collections.abc import Callable

EXPERTS = {"cuda": ("grouped_mm", "batched_mm"), "cpu": ("eager",)}
"""Implementations of experts to try; prompts go through the first, another would copy the weights of each token."""
GRAPHS = {"cuda": (True, False), "cpu": (False,)}
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
            ids = torch.randint(0, network.config.vocab_size, (work.batch, work.prompt_tokens), device=place)
            prompt = prefill_seconds(network, ids, repeats)
            for experts, graph in product(EXPERTS[place.type], GRAPHS[place.type]):
                how = f"{experts}, {'graph' if graph else 'launches'}"
                try:
                    steps = decode(network, ids, work, experts, graph=graph)
                except (RuntimeError, ValueError, TypeError) as error:
                    errors[f"{work} {how}"] = str(error)[:300]
                    continue
                facts = {"work": str(work), "prefill_seconds": prompt, "step_seconds": median(steps)}
                runs.append(facts | {"how": how})
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


def prefill_seconds(network: Any, ids: torch.Tensor, repeats: int) -> float:
    """Median seconds from a prompt to the logits of its last token."""
    network.set_experts_implementation(EXPERTS[ids.device.type][0])
    times = []
    for _ in range(repeats + 1):
        before = _now(ids.device)
        network(ids, use_cache=True, logits_to_keep=1)
        times.append(_now(ids.device) - before)
    return median(times[1:])


def decode(network: Any, ids: torch.Tensor, work: Work, experts: str, *, graph: bool) -> list[float]:
    """Seconds of each step, the token of one being the input of the next."""
    device, cache = ids.device, None
    if device.type == "cuda":
        size = work.prompt_tokens + work.new_tokens + 2 * WARM_UPS
        cache = transformers.StaticCache(config=network.config, max_cache_len=size)
    network.set_experts_implementation(EXPERTS[device.type][0])
    output = network(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    network.set_experts_implementation(experts)
    step = make_step(network, output.past_key_values, output.logits[:, -1:].argmax(-1), work.prompt_tokens)
    run = _captured(step) if graph else step
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
