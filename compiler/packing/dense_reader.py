"""The tensors of ``weights/dense.safetensors`` as pieces of bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from moec.artifacts.model import DTYPE_BYTES
from moec.compiler.packing.tensors.binding import Binding, Converted, Renamed, Stacked
from moec.compiler.packing.tensors.recipes import evaluate
from moec.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from moec.artifacts.packing import DenseTensor
    from moec.compiler.packing.dense import PlacedTensor
    from moec.compiler.packing.quantizing import Quantizer
    from moec.compiler.packing.tensors.reading import TensorReader
    from moec.compiler.packing.tensors.stored import Stored

CONSTANT = "constant:"


class DensePiece(NamedTuple):
    """Some rows of a dense tensor, or all of it."""

    placed: PlacedTensor
    values: torch.Tensor
    """Valid until the next piece is asked for; bytes of rows where the checkpoint has them in the tensor's format."""
    quantizer: Quantizer | None
    """What makes the tensor's bytes of them; None: they are stored as they are."""


def direct(tensor: DenseTensor, parameters: Mapping[str, Binding]) -> Stored | None:
    """The one tensor of the checkpoint that a dense tensor is a copy of."""
    binding = parameters.get(tensor.sources[0]) if len(tensor.sources) == 1 else None
    if tensor.steps or not isinstance(binding, Renamed) or binding.transposed:
        return None
    flat = binding.stored.encoding is None or len(binding.stored.shape) == 2
    return binding.stored if flat and binding.stored.shape == tensor.shape else None


def parameters_of(tensor: DenseTensor) -> tuple[str, ...]:
    """The parameters of the transformers model among its sources."""
    return tuple(source for source in tensor.sources if not source.startswith(CONSTANT))


@dataclass(frozen=True)
class DenseReader:
    """Reads dense tensors, in one thread."""

    parameters: Mapping[str, Binding]
    dtypes: Mapping[str, torch.dtype]
    """Parameter -> element type that its tensors are read as."""
    quantizers: Mapping[str, Quantizer]
    """For each format that tensors are stored in."""
    constants: Mapping[str, torch.Tensor]
    reader: TensorReader
    model: PreTrainedModel
    """On the meta device, for transformers' own conversions."""
    hold: Callable[[int], None]
    """Called with the bytes that are about to be held beyond a piece."""

    def pieces(self, group: Sequence[PlacedTensor]) -> Iterator[DensePiece]:
        """The group's tensors front to back, a few rows at a time where one is a copy of one of the checkpoint."""
        loaded: dict[str, torch.Tensor] = {}
        held = False
        for placed in group:
            stored = direct(placed.tensor, self.parameters)
            quantizer = self.quantizers.get(placed.tensor.format or "")
            if stored is not None and quantizer is not None and stored.format == quantizer.kind.name:
                for values in self.reader.pieces(stored, 0, stored.rows, quantizer.kind):
                    yield DensePiece(placed, values, None)
            elif stored is not None and len(group) == 1:
                dtype = self.dtypes[placed.tensor.sources[0]]
                for values in self.reader.pieces(stored, 0, stored.rows, dtype):
                    yield DensePiece(placed, values, quantizer)
            else:
                if not held:
                    self.hold(self._held_bytes(group))
                    held = True
                made = _evaluate(placed.tensor, lambda source: self._load(source, loaded))
                yield DensePiece(placed, made, quantizer)

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter of the transformers model, whole."""
        return self._made(name, self.parameters[name])[name]

    def _held_bytes(self, group: Sequence[PlacedTensor]) -> int:
        names = {name for placed in group for name in parameters_of(placed.tensor)}
        read = 0
        for name in names:
            for one in self.parameters[name].stored_tensors:
                read += max(one.size_bytes, math.prod(one.shape) * self.dtypes[name].itemsize)
        made = sum(math.prod(placed.tensor.shape) * DTYPE_BYTES[placed.tensor.dtype] for placed in group)
        return 2 * read + made

    def _load(self, source: str, loaded: dict[str, torch.Tensor]) -> torch.Tensor:
        if source.startswith(CONSTANT):
            return self.constants[source.removeprefix(CONSTANT)]
        if source not in loaded:
            loaded.update(self._made(source, self.parameters[source]))
        return loaded[source]

    def _made(self, name: str, binding: Binding) -> dict[str, torch.Tensor]:
        dtype = self.dtypes[name]
        match binding:
            case Renamed(stored, transposed):
                value = self.reader.whole(stored, dtype)
                return {name: value.mT.contiguous() if transposed else value}
            case Stacked(groups):
                stacks = [torch.stack([self.reader.whole(one, dtype) for one in group]) for group in groups]
                return {name: binding.joined(stacks)}
            case Converted():
                return binding.convert(lambda stored: self.reader.whole(stored, dtype), self.model)


def _evaluate(tensor: DenseTensor, load: Callable[[str], torch.Tensor]) -> torch.Tensor:
    try:
        return evaluate(tensor, load)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        raise BundleError(
            f"Cannot make tensor {tensor.name} as packing.json says.",
            str(error)[:300],
            "Make the modules again with moec compile --modules-only.",
        ) from error
