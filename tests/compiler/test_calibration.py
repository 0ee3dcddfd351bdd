"""The chain on calibration tokens against autograd through transformers: every weight's gradient, every choice."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moec.compiler.calibration.chain import SEED, CalibrationRun, why_not
from moec.compiler.calibration.products import ExpertMatrix
from moec.compiler.calibration.values import ValueFiles
from moec.compiler.calibration.weights import CheckpointWeights
from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.tracing.model.text_half import from_tokens
from tests.support.canaries import most_slow
from tests.support.graphs import parts
from tests.support.tiny_models import build, save

if TYPE_CHECKING:
    from pathlib import Path

    from moec.artifacts.model import ExpertBody
    from moec.artifacts.packing import ExpertSource
    from moec.compiler.calibration.products import Product
    from moec.compiler.partition import PartitionedModel

MODELS = ("gpt_oss", "mixtral", "deepseek_v2", "qwen3_next", "jamba", "llama4", "minimax", "deepseek_v32")
"""Sinks, biases and windows; one tensor an expert; latents; states of each kind; turned experts; selected positions."""
SEQUENCES = [[5, 17, 2, 40, 33, 9, 71], [8, 3, 60, 11, 12, 13, 90, 45, 7, 7, 31]]
TOLERANCE = 2e-4
"""transformers advances states in chunks, with products and differences that round."""


def prepared(name: str, folder: Path) -> tuple[PartitionedModel, CheckpointWeights]:
    checkpoint = open_checkpoint(save(name, folder / "checkpoint"))
    made = parts(name)
    made = replace(made, packing=replace(made.packing, config_sha256=checkpoint.config_sha256))
    return made, CheckpointWeights(checkpoint, made)


@pytest.mark.parametrize("name", most_slow(MODELS, ("gpt_oss",)))
def test_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    made, weights = prepared(name, tmp_path)
    assert why_not(made.model) is None
    run = CalibrationRun(made, weights, SEQUENCES, ValueFiles(tmp_path))
    found: dict[Any, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
    flowed: dict[Any, int] = defaultdict(int)

    def count(product: Product) -> None:
        assert product.gradient is None
        flowed[product.name] += len(product.x)

    def add_up(product: Product) -> None:
        assert product.gradient is not None
        flowed[product.name] -= len(product.x)
        if product.x.dtype == torch.int64:
            table = torch.zeros(product.weight.shape).index_add_(0, product.x, product.gradient)
            found[product.name] = found[product.name] + table
        else:
            found[product.name] = found[product.name] + product.gradient.T @ product.x

    run.forward(count)
    run.backward(add_up)
    head = {name for name, rest in flowed.items() if rest < 0}
    assert len(head) == 1, "only the last product is not run forward"
    assert not any(rest for name, rest in flowed.items() if name not in head)
    expected = reference(name)
    sources = {tensor.name: tensor for tensor in made.packing.dense}
    compared = 0
    for product, gradient in found.items():
        if isinstance(product, ExpertMatrix):
            body = next(
                body for body in made.model.bodies if body.name == made.model.experts[product.layer].body
            )
            theirs = expert_gradient(expected, made.packing.experts[product.layer], body, product)
        elif sources[product].steps:
            continue
        else:
            theirs = expected[sources[product].sources[0]]
        error = (gradient - theirs).norm() / theirs.norm()
        assert error < TOLERANCE, product
        compared += 1
    assert compared > 3 * len(made.model.experts)


def reference(name: str) -> dict[str, torch.Tensor]:
    """Gradients of the same drawn continuations' likelihood, by the parameters' names."""
    model = build(name)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    network = from_tokens(model)
    logits = torch.cat([network(torch.tensor([ids])).logits[0] for ids in SEQUENCES])
    likelihood = torch.log_softmax(logits.float(), -1)
    drawn = torch.multinomial(likelihood.detach().exp(), 1, generator=torch.Generator().manual_seed(SEED))
    torch.autograd.backward(likelihood.gather(1, drawn).sum())
    return {path: item.grad for path, item in model.named_parameters() if item.grad is not None}


def expert_gradient(
    gradients: dict[str, torch.Tensor], source: ExpertSource, body: ExpertBody, matrix: ExpertMatrix
) -> torch.Tensor:
    """Of one matrix, in the order that bundles have."""
    found = gradients[source.down if matrix.part == "down" else source.up][matrix.expert]
    found = found.T if source.transposed else found
    if matrix.part == "down" or not body.gated:
        return found
    number = ("gate", "up").index(matrix.part)
    return found[number::2] if source.interleaved else found.chunk(2)[number]


def test_choices_are_those_that_were_made(tmp_path: Path) -> None:
    made, weights = prepared("gpt_oss", tmp_path)
    run = CalibrationRun(made, weights, SEQUENCES, ValueFiles(tmp_path))
    seen: set[tuple[int, int]] = set()

    def note(product: Product) -> None:
        if isinstance(product.name, ExpertMatrix):
            seen.add((product.name.layer, product.name.expert))

    run.forward(note)
    chosen = run.chosen()
    assert [each.shape for each in chosen] == [(run.tokens, layer.top_k) for layer in made.model.experts]
    assert seen == {
        (layer, expert) for layer, each in enumerate(chosen) for expert in each.flatten().tolist()
    }
