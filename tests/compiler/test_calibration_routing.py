"""What routers' narrow decisions send back, against autograd through transformers."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moec.compiler.calibration import chain
from moec.compiler.calibration.chain import SEED, CalibrationRun
from moec.compiler.calibration.products import ExpertMatrix
from moec.compiler.calibration.routing import NARROW, gap_seeds, gaps, swap_cost
from moec.compiler.calibration.values import ValueFiles
from moec.compiler.tracing.model.text_half import from_tokens
from tests.compiler.test_calibration import SEQUENCES, TOLERANCE, expert_gradient, prepared
from tests.support.tiny_models import build

if TYPE_CHECKING:
    from pathlib import Path

    from moec.compiler.calibration.products import Product


def test_a_gap_is_between_the_last_chosen_and_the_next() -> None:
    scores = torch.tensor([[[0.1, 0.5, 0.3, 0.35], [0.9, -math.inf, 0.2, 0.1]]])
    found = gaps(scores, 2)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([0.05, 0.1]))
    assert gaps(scores, 4) is None


def test_a_swap_costs_what_the_last_choice_is_worth() -> None:
    weight = torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    gradient = torch.tensor([[9.0, 2.0], [9.0, -1.0]])
    assert swap_cost(weight, gradient) == pytest.approx((0.6**2 + 0.4**2) / 2)


def test_seeds_are_density_times_cost() -> None:
    """Of evenly spread gaps the density is one over their range; where there is no next expert, nothing is sent."""
    found = torch.linspace(0, 4, 1001)
    seeds = gap_seeds(found, 3.0, seed=1)
    torch.testing.assert_close(seeds.abs(), torch.full_like(seeds, NARROW / (4 * NARROW) * 3))
    assert abs(float(seeds.sign().mean())) < 0.1
    found[5] = math.inf
    assert gap_seeds(found, 3.0, seed=1)[5] == 0


def test_gradients_of_gaps_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With swaps that cost 1 in each layer: of the products before a router, and through experts and attention."""
    monkeypatch.setattr(chain, "swap_cost", lambda *_: 1.0)
    made, weights = prepared("mixtral", tmp_path)
    run = CalibrationRun(made, weights, SEQUENCES, ValueFiles(tmp_path))
    found: dict[Any, torch.Tensor] = defaultdict(lambda: torch.zeros(()))

    def add_up(product: Product) -> None:
        if product.routing is None:
            return
        if product.x.dtype == torch.int64:
            rows = torch.zeros(product.weight.shape).index_add_(0, product.x, product.routing)
        else:
            rows = product.routing.T @ product.x
        found[product.name] = found[product.name] + rows

    run.forward()
    run.backward(add_up)
    expected = reference(made.model.experts[0].top_k)
    sources = {tensor.name: tensor for tensor in made.packing.dense}
    body = made.model.bodies[0]
    last = len(made.model.experts) - 1
    assert not any(isinstance(name, ExpertMatrix) and name.layer == last for name in found)
    assert any(isinstance(name, ExpertMatrix) for name in found)
    for product, gradient in found.items():
        if isinstance(product, ExpertMatrix):
            theirs = expert_gradient(expected, made.packing.experts[product.layer], body, product)
        else:
            theirs = expected[sources[product].sources[0]]
        assert (gradient - theirs).norm() < TOLERANCE * theirs.norm(), product
    assert len(found) > 3


def reference(top_k: int) -> dict[str, torch.Tensor]:
    """By the parameters' names: of the sum of all routers' gaps, each times its seed."""
    model = build("mixtral")
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    scores: list[list[torch.Tensor]] = []

    def note(router: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        hidden = arguments[0]
        logits = torch.nn.functional.linear(
            hidden.reshape(-1, hidden.shape[-1]), router.get_parameter("weight")
        )
        scores[-1].append(torch.softmax(logits, -1))

    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_pre_hook(note)
    network = from_tokens(model)
    for ids in SEQUENCES:
        scores.append([])
        network(torch.tensor([ids]))
    layers = [torch.cat(each) for each in zip(*scores, strict=True)]
    total = torch.zeros(())
    for layer, each in enumerate(layers):
        found = gaps(each, top_k)
        assert found is not None
        total = total + (found * gap_seeds(found, 1.0, SEED + len(layers) - layer)).sum()
    torch.autograd.backward(total)
    return {path: item.grad for path, item in model.named_parameters() if item.grad is not None}
