"""Biases that quantized checkpoints have and their models do not: GPTQ's packers give every product one, of zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moec.compiler.packing.tensors.reading import FileSource, TensorReader

if TYPE_CHECKING:
    from moec.compiler.packing.tensors.binding import Bindings
    from moec.compiler.packing.tensors.stored import Stored

WEIGHT, BIAS = ".weight", ".bias"


def idle_biases(bindings: Bindings, tensors: dict[str, Stored]) -> set[str]:
    """Unexpected tensors that are the biases of quantized weights and add nothing.

    Where only the headers of a checkpoint are on this machine, they are taken for zeros until packing.
    """
    reader = TensorReader(FileSource())
    found = set()
    for name in bindings.unexpected:
        weight = tensors.get(f"{name.removesuffix(BIAS)}{WEIGHT}") if name.endswith(BIAS) else None
        if weight is None or weight.encoding is None:
            continue
        bias = tensors[name]
        if not bias.entry.file.is_file() or not reader.whole(bias, torch.float32).any():
            found.add(name)
    return found
