"""The routed experts of a layer on calibration tokens, one expert at a time."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING

import torch

from moec.compiler.activation import activate
from moec.compiler.calibration.probes import back, mapped
from moec.compiler.calibration.products import ExpertMatrix, Product

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moec.artifacts.ids import LayerId
    from moec.artifacts.model import ExpertBody
    from moec.compiler.calibration.probes import Gradients
    from moec.compiler.calibration.products import Observer
    from moec.compiler.calibration.weights import CheckpointWeights


def run_experts(
    weights: CheckpointWeights,
    layer: LayerId,
    body: ExpertBody,
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    observe: Observer | None = None,
) -> torch.Tensor:
    """``out [T, H]`` of ``x [T, H]``, ``index [T, K]``, ``weight [T, K]``; ``observe`` sees products, no gradients."""
    out = torch.zeros_like(x)
    for expert, tokens, choices in _chosen(index):
        parts = weights.expert(layer, expert)
        products = products_of(body, parts, x[tokens])
        out.index_add_(0, tokens, products["down"][1] * weight[tokens, choices, None])
        if observe is not None:
            for name, (rows, _) in products.items():
                observe(Product(ExpertMatrix(layer, expert, name), parts[name], rows, None))
    return out


def run_experts_back(
    weights: CheckpointWeights,
    layer: LayerId,
    body: ExpertBody,
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gradients: Gradients,
    observe: Observer,
) -> tuple[Gradients, Gradients]:
    """Gradients of ``x`` and ``weight`` from those of ``out``; ``observe`` sees every product with its own."""
    of_x = mapped(lambda _: torch.zeros_like(x), gradients)
    of_weight = mapped(lambda _: torch.zeros_like(weight), gradients)
    for expert, tokens, choices in _chosen(index):
        parts = weights.expert(layer, expert)
        with torch.enable_grad():
            rows = x[tokens].requires_grad_()
            factor = weight[tokens, choices].requires_grad_()
            products = products_of(body, parts, rows)
            results = [result for _, result in products.values()]
            out = products["down"][1] * factor[:, None]
        own = mapped(itemgetter(tokens), gradients)
        of_rows, of_factor, *of_results = back([(out, own)], [rows, factor, *results])
        for probe in (0, 1):
            _add(of_x[probe], (tokens,), of_rows[probe])
            _add(of_weight[probe], (tokens, choices), of_factor[probe])
        for (name, (entered, _)), found in zip(products.items(), of_results, strict=True):
            observe(Product(ExpertMatrix(layer, expert, name), parts[name], entered.detach(), *found))
    return of_x, of_weight


def _add(whole: torch.Tensor | None, places: tuple[torch.Tensor, ...], found: torch.Tensor | None) -> None:
    """A token chooses an expert once: no place comes twice."""
    if whole is not None and found is not None:
        whole[places] += found


def _chosen(index: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each expert that some token chose, with these tokens and the number of the choice."""
    for expert in sorted(set(index.flatten().tolist())):
        tokens, choices = torch.where(index == expert)
        yield expert, tokens, choices


def products_of(
    body: ExpertBody, parts: Mapping[str, torch.Tensor], x: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each matrix what enters it, and its result with the bias."""
    found = {name: (x, result) for name, result in _outer_results(body, parts, x).items()}
    inner = activate(body.activation, {name: result for name, (_, result) in found.items()})
    return {**found, "down": (inner, _linear(parts, "down", inner))}


def inner_of(body: ExpertBody, parts: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What enters down."""
    return activate(body.activation, _outer_results(body, parts, x))


def _outer_results(
    body: ExpertBody, parts: Mapping[str, torch.Tensor], x: torch.Tensor
) -> dict[str, torch.Tensor]:
    return {name: _linear(parts, name, x) for name in (("gate", "up") if body.gated else ("up",))}


def _linear(parts: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, parts[name], parts.get(f"{name}_bias"))
