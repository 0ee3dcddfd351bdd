"""``packing.json``: how each weight of the bundle is made from the tensors of the checkpoint.

Written by the compiler next to the modules, so that ``moec pack`` can run where the weights are, without TVM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from moec.artifacts.fit import FitRecord
from moec.artifacts.ids import LayerId, TensorName
from moec.artifacts.model import DType, TensorSpec
from moec.artifacts.quantization import Quantization

RecipeArgument: TypeAlias = "bool | int | float | str | tuple[RecipeArgument, ...] | dict[str, int] | None"
"""A literal, a list of literals, or ``{"ref": n}``: source n, or (counting on) the result of an earlier
step."""


@dataclass(frozen=True)
class RecipeStep:
    """One weight-only ATen operation, e.g. ``aten.transpose.int``."""

    op: str
    arguments: tuple[RecipeArgument, ...]


@dataclass(frozen=True)
class DenseTensor:
    """One tensor of ``weights/dense.safetensors``: the last step's result, or source 0 without steps."""

    name: TensorName
    dtype: DType
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    """Parameter names of the transformers model, or ``constant:<name>`` for one in
    ``constants.safetensors``."""
    steps: tuple[RecipeStep, ...]
    format: str | None = None
    """A name in ``moec.formats.FORMATS`` that the result, a matrix, is stored in; None: as it is."""

    @property
    def spec(self) -> TensorSpec:
        """Element type, shape and format."""
        return TensorSpec(self.dtype, self.shape, self.format)


@dataclass(frozen=True)
class ExpertSource:
    """Where the routed experts of one layer come from: parameters ``[E, ...]`` of the transformers model."""

    layer: LayerId
    up: str
    """``gate_up_proj`` (gated) or ``up_proj``: ``[E, 2I, H]`` or, transposed, ``[E, H, 2I]``."""
    down: str
    up_bias: str | None
    down_bias: str | None
    transposed: bool
    interleaved: bool
    """gate and up alternate (gpt-oss) instead of lying one after the other."""


@dataclass(frozen=True)
class PackingRecord:
    """The whole of ``packing.json``."""

    config_sha256: str
    """Of the canonical JSON of the checkpoint's config: packing another model's weights is an error."""
    parameter_dtypes: dict[str, DType]
    """Type that each parameter is read as: its storage type where anything made of it keeps that, else float32."""
    dense: tuple[DenseTensor, ...]
    experts: tuple[ExpertSource, ...]
    quantization: Quantization | None = None
    """The policy that formats in ``model.json`` follow, and the method; None: all weights are plain."""
    fit: FitRecord | None = None
    """What the policy was chosen for and by; None: somebody named it."""
