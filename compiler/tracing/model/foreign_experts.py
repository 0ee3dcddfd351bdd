"""Experts that transformers keeps off its experts interface, brought behind it.

A model is adopted after it is built, on the meta device: what counts is the shape and the place of the parameters, and
a forward that ends in the marker. Where their layout is another than the interface's, the parameters are made anew,
and ``CONVERSIONS`` says how the checkpoint's tensors become them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)
from transformers.integrations.moe import _default_apply_gate

from moec.compiler.tracing.interface import run_experts

if TYPE_CHECKING:
    from collections.abc import Callable


class Unflatten(ConversionOps):  # type: ignore[misc]
    """``[E * I, H]`` is ``[E, I, H]``: first in a conversion, and done by reading (see ``packing.tensors.binding``)."""

    def convert(self, *_: Any, **__: Any) -> Any:
        """Never called: binding takes this operation away."""
        raise NotImplementedError


@dataclass(frozen=True)
class Foreign:
    """How the experts of one model type are adopted."""

    modules: str
    """Class name of the modules that hold experts."""
    adopt: Callable[[Any], None]
    """Brings one such module behind the interface."""
    conversions: tuple[Any, ...] = ()
    """What its checkpoints need beside transformers' own renamings and conversions."""


def adopt_experts(model: Any) -> None:
    """Bring the experts of ``model`` behind the interface, if they are of a kind in ``FOREIGN``."""
    foreign = FOREIGN.get(model.config.model_type)
    if foreign is None:
        return
    for module in list(model.modules()):
        if type(module).__name__ == foreign.modules:
            foreign.adopt(module)


def _describe(module: Any, *, gate: bool = True, bias: bool = False, transposed: bool = False) -> None:
    module.has_gate, module.has_bias, module.has_post_expert_norm = gate, bias, False
    module.is_transposed, module.is_concatenated = transposed, True
    if gate and not hasattr(module, "_apply_gate"):
        module._apply_gate = MethodType(_default_apply_gate, module)


def _same_layout(module: Any) -> None:
    _describe(module)
    module.forward = MethodType(run_experts, module)


def _transposed_layout(module: Any) -> None:
    _describe(module, transposed=True)
    module.forward = MethodType(run_experts, module)


def _matrices(module: Any, experts: int, intermediate: int, hidden: int, like: torch.Tensor) -> None:
    module.gate_up_proj = nn.Parameter(like.new_empty(experts, 2 * intermediate, hidden))
    module.down_proj = nn.Parameter(like.new_empty(experts, hidden, intermediate))


def _dbrx(module: Any) -> None:
    """Three matrices ``[E * I, H]`` in a module of their own, called with ``[1, T, H]``."""
    mlp = module.mlp
    del module.mlp
    _matrices(module, module.num_experts, module.ffn_hidden_size, module.hidden_size, mlp.w1)
    module.act_fn = mlp.activation_fn
    _describe(module)

    def forward(self: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return run_experts(self, hidden.reshape(-1, self.hidden_size), index, weight).view(hidden.shape)

    module.forward = MethodType(forward, module)


def _jetmoe(module: Any) -> None:
    """A block with two modules ``[E, out, in]``, of which the activation is between."""
    up = module.input_linear.weight
    experts = nn.Module()
    _matrices(experts, up.shape[0], up.shape[1] // 2, up.shape[2], up)
    experts.act_fn = module.activation
    _describe(experts)
    experts.forward = MethodType(run_experts, experts)
    del module.input_linear, module.output_linear
    module.experts = experts


def _longcat_flash(module: Any) -> None:
    """Experts past the last one with weights give their input back; transformers has rows of weights for them."""
    count = module.num_routed_experts
    _matrices(module, count, module.intermediate_size, module.hidden_size, module.down_proj)
    _describe(module)

    def forward(self: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        identity = index >= count
        kept = torch.where(identity, 0.0, weight)
        passed = (weight - kept).sum(-1, keepdim=True)
        # In the place of an identity stands the token's lowest real expert, with no weight: nothing more is fetched.
        spare = torch.clamp(index.float().amin(-1, keepdim=True), max=count - 1).long()
        return run_experts(self, hidden, torch.where(identity, spare, index), kept) + hidden * passed

    module.forward = MethodType(forward, module)


def _modules(up: str, down: str) -> Callable[[Any], None]:
    """For experts that are modules ``expert_<number>`` of their own: two products, and no gate between them."""

    def adopt(module: Any) -> None:
        first, experts = module["expert_0"], module.num_experts
        module.act_fn = first.act
        for target, product in (("up_proj", getattr(first, up)), ("down_proj", getattr(first, down))):
            for suffix, one in (("", product.weight), ("_bias", product.bias)):
                if one is not None:
                    parameter = nn.Parameter(one.new_empty(experts, *one.shape))
                    module.register_parameter(f"{target}{suffix}", parameter)
        for number in range(experts):
            del module[f"expert_{number}"]
        _describe(module, gate=False, bias=hasattr(module, "up_proj_bias"))
        module.forward = MethodType(run_experts, module)

    return adopt


def _merged(up: str, down: str, *suffixes: tuple[str, str]) -> tuple[WeightConverter, ...]:
    """Conversions for tensors ``experts.expert_<number>.<product>.<suffix>``; suffixes as stored and as adopted."""
    return tuple(
        WeightConverter(
            rf"experts\.expert_*.{product}\.{stored}",
            f"experts.{target}{suffix}",
            operations=[MergeModulelist(0)],
        )
        for product, target in ((up, "up_proj"), (down, "down_proj"))
        for stored, suffix in suffixes
    )


FOREIGN: dict[str, Foreign] = {
    "dbrx": Foreign(
        "DbrxExperts",
        _dbrx,
        (
            WeightConverter(
                [r"experts\.mlp\.w1", r"experts\.mlp\.v1"],
                "experts.gate_up_proj",
                operations=[Unflatten(), Concatenate(1)],
            ),
            WeightConverter(
                r"experts\.mlp\.w2", "experts.down_proj", operations=[Unflatten(), Transpose(1, 2)]
            ),
        ),
    ),
    "jetmoe": Foreign(
        "JetMoeMoE",
        _jetmoe,
        (
            WeightRenaming(r"\.mlp\.input_linear\.weight", ".mlp.experts.gate_up_proj"),
            WeightRenaming(r"\.mlp\.output_linear\.weight", ".mlp.experts.down_proj"),
        ),
    ),
    "llama4": Foreign("Llama4TextExperts", _transposed_layout),
    "llama4_text": Foreign("Llama4TextExperts", _transposed_layout),
    "longcat_flash": Foreign("LongcatFlashExperts", _longcat_flash),
    "nllb-moe": Foreign(
        "NllbMoeExperts",
        _modules("fc1", "fc2"),
        _merged("fc1", "fc2", ("weight", ""), ("bias", "_bias")),
    ),
    "step3p7": Foreign("Step3p7Experts", _same_layout),
    "switch_transformers": Foreign(
        "SwitchTransformersExperts", _modules("wi", "wo"), _merged("wi", "wo", ("weight", ""))
    ),
}
"""``model_type`` -> its experts."""
