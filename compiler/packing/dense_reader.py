"""The tensors of ``weights/dense.safetensors`` as pieces of bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moec.artifacts.model import DTYPE_BYTES
from moec.compiler.packing.binding import Binding, Converted, Renamed, Stacked
from moec.compiler.packing.recipes import evaluate
from moec.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from moec.artifacts.packing import DenseTensor
    from moec.compiler.packing.dense import PlacedTensor
    from moec.compiler.packing.reading import TensorReader
    from moec.compiler.packing.stored import Stored

CONSTANT = "constant:"


def parameters_of(tensor: DenseTensor) -> tuple[str, ...]:
    """The parameters of the transformers model among its sources."""
    return tuple(source for source in tensor.sources if not source.startswith(CONSTANT))


@dataclass(frozen=True)
class DenseReader:
    """Reads dense tensors, in one thread."""

    parameters: Mapping[str, Binding]
    dtypes: Mapping[str, torch.dtype]
    """Parameter -> element type that its tensors are read as."""
    constants: Mapping[str, torch.Tensor]
    reader: TensorReader
    model: PreTrainedModel
    """On the meta device, for transformers' own conversions."""
    hold: Callable[[int], None]
    """Called with the bytes that are about to be held beyond a piece."""

    def pieces(self, group: Sequence[PlacedTensor]) -> Iterator[tuple[PlacedTensor, torch.Tensor]]:
        """The group's tensors front to back, a few rows at a time if it is one of the checkpoint."""
        stored = self._direct(group)
        if stored is not None:
            dtype = self.dtypes[group[0].tensor.sources[0]]
            for values in self.reader.pieces(stored, 0, stored.rows, dtype):
                yield group[0], values
            return
        self.hold(self._held_bytes(group))
        loaded: dict[str, torch.Tensor] = {}
        for placed in group:
            yield placed, _evaluate(placed.tensor, lambda source: self._load(source, loaded))

    def _direct(self, group: Sequence[PlacedTensor]) -> Stored | None:
        """The one tensor of the checkpoint that the group's only tensor is a copy of."""
        tensor = group[0].tensor
        binding = self.parameters.get(tensor.sources[0]) if len(tensor.sources) == 1 else None
        alone = len(group) == 1 and not tensor.steps and isinstance(binding, Renamed)
        if not alone or not isinstance(binding, Renamed) or binding.transposed:
            return None
        flat = binding.stored.encoding == "plain" or len(binding.stored.shape) == 2
        return binding.stored if flat and binding.stored.shape == tensor.shape else None

    def _held_bytes(self, group: Sequence[PlacedTensor]) -> int:
        names = {name for placed in group for name in parameters_of(placed.tensor)}
        read = 0
        for name in names:
            for one in self.parameters[name].stored_tensors:
                read += max(
                    one.entry.end - one.entry.begin, math.prod(one.shape) * self.dtypes[name].itemsize
                )
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
                return {name: torch.cat(stacks, dim=1) if len(stacks) > 1 else stacks[0]}
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
