"""One trace in progress: what transformers calls instead of attention, masks, experts and cache."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moec.compiler.tracing import markers
from moec.compiler.tracing.attention import NO_BIAS, attend_latents, check_arguments
from moec.compiler.tracing.interface import INTERFACE
from moec.compiler.tracing.masks import MaskSpec, describe_mask
from moec.compiler.tracing.recording import RecordingCache
from moec.compiler.tracing.selection import selection_of
from moec.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


class Session:
    """The functions that stand in for transformers' own, and what they saw.

    Args:
        model: on any device; its modules are known by their paths.
        max_context: tokens of the longest sequence.
    """

    def __init__(self, model: torch.nn.Module, max_context: int) -> None:
        self.class_name = type(model).__name__
        self.cache = RecordingCache(max_context)
        self._paths = {id(module): path for path, module in model.named_modules()}

    @contextmanager
    def interfaces(self) -> Iterator[None]:
        """Stand in transformers' registries under the name ``moec``."""
        registries = (AttentionInterface, AttentionMaskInterface, type(ALL_EXPERTS_FUNCTIONS))
        for registry, function in zip(registries, (self.attention, self.mask, self.experts), strict=True):
            registry.register(INTERFACE, function)
        try:
            yield
        finally:
            for registry in registries:
                del registry._global_mapping[INTERFACE]

    def mask(self, mask_function: Any, **_: Any) -> MaskSpec:
        """Transformers' mask interface; sizes and dtypes are of no interest to a description."""
        return describe_mask(mask_function, self.class_name)

    def experts(
        self, module: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Transformers' experts interface: ``[T, H]``, ``[T, K]``, ``[T, K]`` to ``[T, H]``."""
        output: torch.Tensor = markers.experts(hidden, index, weight, self._paths[id(module)])
        return output

    def attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        **arguments: Any,
    ) -> tuple[torch.Tensor, None]:
        """Transformers' attention interface: head-major ``[1, heads, T, D]`` in, token-major out."""
        path = self._paths[id(module)]
        owner = f"{self.class_name} ({type(module).__name__})"
        selected = selection_of(arguments, self.cache.max_context, owner)
        check_arguments(owner, arguments)
        cross = str(key.shape[2]) != str(query.shape[2])
        mask = _expect_mask(owner, attention_mask, arguments, cross=cross)
        options = {
            "sinks": arguments.get("s_aux"),
            "selection": selected,
            "module": path,
            "scaling": float(query.shape[-1] ** -0.5 if scaling is None else scaling),
            "window": mask.window,
            "chunk": mask.chunk,
            "softcap": float(arguments.get("softcap") or 0.0),
            "causal": mask.causal,
            "cross": cross,
        }
        if hasattr(module, "expand_kv"):
            return attend_latents(module, owner, query, self.cache.recorded[module.layer_idx], options), None
        bias = arguments.get("position_bias")
        attended = markers.attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            **options,
            bias=None if bias is NO_BIAS else bias,
            absorb=None,
            expand=None,
            project=None,
            value_dim=value.shape[-1],
        )
        return attended, None


def _expect_mask(owner: str, mask: Any, arguments: dict[str, Any], *, cross: bool) -> MaskSpec:
    if cross and mask is None:
        return MaskSpec(causal=False)
    if not isinstance(mask, MaskSpec):
        raise UnsupportedModelError(
            f"{owner} passes attention_mask as {type(mask).__name__}, which moec does not know.",
            "Masks must come from transformers' mask interface.",
        )
    if cross and mask.causal:
        raise UnsupportedModelError(
            f"{owner} hides keys of another sequence by their positions.",
            "Positions of two sequences do not compare; moec knows cross-attention to all of a source.",
        )
    window = arguments.get("sliding_window")
    if window is not None and window != mask.window:
        raise UnsupportedModelError(
            f"{owner} passes sliding_window={window} beside a mask with a window of {mask.window}",
            "moec cannot tell which of them is meant.",
        )
    return mask
