"""Routed experts of a model in transformers, rounded by what enters them on calibration text.

The arithmetic is packing's (`moec.compiler.calibration.rounding`), on values that transformers' own pass forward shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moec.compiler.calibration.rounding import LayerFeedback, moments_of
from moec.formats import dequantize_rows
from moec.formats.feedback import shrunk

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from moec.artifacts.model import ExpertBody
    from moec.compiler.packing.calibrated import LayerRounding
    from moec.formats import Format


@dataclass(frozen=True, eq=False)
class ExpertInputs:
    """What entered one layer's experts."""

    x: torch.Tensor
    """``[T, H]``."""
    index: torch.Tensor
    """``[T, K]``."""


def expert_inputs(model: torch.nn.Module, sequences: Sequence[Sequence[int]]) -> dict[str, ExpertInputs]:
    """By the name of the module of each layer's experts; ``sequences`` are run one by one."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def note(name: str, arguments: Sequence[Any]) -> None:
        x, index = arguments[:2]
        seen.setdefault(name, []).append((x.reshape(-1, x.shape[-1]).clone(), index.clone()))

    hooks = [
        module.register_forward_pre_hook(
            lambda _, arguments, named, name=name: note(name, (*arguments, *named.values())), with_kwargs=True
        )
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    with torch.inference_mode():
        for ids in sequences:
            model(torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    return {
        name: ExpertInputs(torch.cat([x for x, _ in parts]), torch.cat([index for _, index in parts]))
        for name, parts in seen.items()
    }


def round_experts(
    gate_up: torch.Tensor, down: torch.Tensor, inputs: ExpertInputs, body: ExpertBody, kind: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of a layer's experts, ``[E, 2I, H]`` and ``[E, H, I]``."""
    moments = shrunk(moments_of(inputs.x), len(inputs.x))
    layer = LayerFeedback(body, inputs.x, inputs.index, moments)
    return rounded_by(layer, kind, (_parts(*each) for each in zip(gate_up, down, strict=True)))


def _parts(gate_up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    gate, up = (part.contiguous() for part in gate_up.chunk(2))
    return {"gate": gate, "up": up, "down": down}


def rounded_by(
    rounding: LayerRounding, kind: Format, experts: Iterable[Mapping[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the parts of each expert, with gate and up in one tensor, as transformers has them."""
    both, downs = [], []
    for expert, parts in enumerate(experts):
        rows = rounding.rows(expert, kind, parts)
        found = {
            name: torch.from_numpy(dequantize_rows(kind, rows[name].numpy(), parts[name].shape[1]))
            for name in ("gate", "up", "down")
        }
        both.append(torch.cat((found["gate"], found["up"])))
        downs.append(found["down"])
    return torch.stack(both), torch.stack(downs)
