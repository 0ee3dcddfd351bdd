"""The routers of a model by themselves: applied to the hidden state one MoE layer earlier they guess what comes.

What lies between (the experts of the earlier layer, an attention, a norm, corrections of a router's scores) is left
out, so it is a guess; `moec.planning.costs.prefetch` says what it is worth.

T tokens, H hidden size, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.artifacts.layout.footprint import dense_weights
from moec.artifacts.steps import ExpertsStep, SegmentStep
from moec.formats import dequantize_rows, format_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.ids import TensorName
    from moec.artifacts.model import ModelRecord, TensorSpec

    Routers = tuple[NDArray[np.float32] | None, ...]
    """Of each MoE layer its router's weight, float32 ``[E, H]``; ``None`` where none could be told."""


def router_names(model: ModelRecord) -> tuple[TensorName | None, ...]:
    """The dense tensor of each MoE layer's router.

    It is the only weight ``[E, H]`` of the segment that gives the layer its choices; ``None`` where there is no such
    one, or several.
    """
    functions = {function.name: function for function in model.functions}
    makers = {
        value: step for step in model.all_steps if isinstance(step, SegmentStep) for value in step.outputs
    }
    names: list[TensorName | None] = []
    for step in (*model.encoder, *model.steps):  # as MoE layers are numbered
        if not isinstance(step, ExpertsStep):
            continue
        maker, shape = makers.get(step.index), (model.experts[step.layer].experts, model.hidden_size)
        fitting = (
            [
                name
                for name, spec in zip(maker.weights, functions[maker.function].weights, strict=True)
                if spec.shape == shape
            ]
            if maker
            else []
        )
        names.append(fitting[0] if len(fitting) == 1 else None)
    return tuple(names)


def early_routers(bundle: Bundle, wanted: Collection[int] | None = None) -> Routers:
    """The routers' weights in float32: of the MoE layers ``wanted``, or of all."""
    specs = dense_weights(bundle.model)
    return tuple(
        None
        if name is None or (wanted is not None and layer not in wanted)
        else _float32(bundle, name, specs[name])
        for layer, name in enumerate(router_names(bundle.model))
    )


def likeliest(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The ``count`` experts of the best scores for each token, from scores ``[T, E]``, likeliest first."""
    best: NDArray[np.int64] = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return best


def _float32(bundle: Bundle, name: TensorName, spec: TensorSpec) -> NDArray[np.float32]:
    place, data = bundle.dense[name], bundle.dense_view(name)
    kind = format_of(spec.format)
    if kind is not None:
        return dequantize_rows(kind, data.reshape(place.shape), int(spec.shape[1]))
    if place.dtype == "bfloat16":
        words = data.view(np.uint16).astype(np.uint32) << 16
        return words.view(np.float32).reshape(place.shape)
    dtype = {"float16": np.float16, "float32": np.float32}[place.dtype]
    return data.view(dtype).astype(np.float32).reshape(place.shape)
