"""Tiny checkpoints as GPTQ's and AWQ's packers write them, from the published layouts: words of 32 bits, by shifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.support.quantized_checkpoints import Published, Tensors, write_pair
from tests.support.tiny_models import save

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs is in a word's first, second, ... four bits."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix ``[N, K]`` in whole numbers: ``(codes - zeros) * scales`` of each input's group."""

    codes: NDArray[np.int64]
    zeros: NDArray[np.int64]
    """``[N, G]``."""
    scales: NDArray[np.float16]
    """``[N, G]``."""
    groups: NDArray[np.int64]
    """``[K]``."""

    @property
    def values(self) -> torch.Tensor:
        """In float32, from float64."""
        steps = self.codes - self.zeros[:, self.groups]
        return torch.from_numpy((steps * self.scales.astype(np.float64)[:, self.groups]).astype(np.float32))


def rounded(
    matrix: NDArray[Any], bits: int, group: int, *, symmetric: bool, reordered: bool = False
) -> Rounded:
    """Round to nearest over each group's range; ``reordered``: groups of inputs taken at random."""
    columns = matrix.shape[1]
    groups = np.arange(columns) // (columns if group < 1 else group)
    if reordered:
        groups = np.random.default_rng(columns).permutation(groups)
    largest, codes = (1 << bits) - 1, np.zeros(matrix.shape, np.int64)
    scales = np.zeros((len(matrix), groups.max() + 1), np.float16)
    zeros = np.full(scales.shape, 1 << (bits - 1))
    for g in range(scales.shape[1]):
        part = matrix[:, groups == g].astype(np.float64)
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[:, g] = np.maximum((high - low) / largest, 1e-5)
        if not symmetric:
            zeros[:, g] = np.rint(-low / scales[:, g])
        steps = np.rint(part / scales[:, g : g + 1].astype(np.float64)) + zeros[:, g : g + 1]
        codes[:, groups == g] = steps.clip(0, largest)
    return Rounded(codes, zeros, scales, groups)


def words(codes: NDArray[np.int64], bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes ``[..., n]`` in words ``[..., n * bits / 32]``, the first (by ``order``) in the lowest bits."""
    count = 32 // bits
    runs = codes.reshape(*codes.shape[:-1], -1, count)
    packed = np.zeros(runs.shape[:-1], np.int64)
    for place, number in enumerate(order or range(count)):
        packed |= runs[..., number] << (bits * place)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def gptq_parts(base: str, weight: Rounded, bits: int, stored_less: int) -> Tensors:
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx``."""
    zeros = (weight.zeros - stored_less) % (1 << bits)
    return {
        f"{base}.qweight": words(weight.codes, bits).T.contiguous(),
        f"{base}.qzeros": words(zeros.T, bits),
        f"{base}.scales": torch.from_numpy(weight.scales.T.copy()),
        f"{base}.g_idx": torch.from_numpy(weight.groups.astype(np.int32)),
    }


def awq_parts(base: str, weight: Rounded) -> Tensors:
    """``qweight``, ``qzeros`` and ``scales``."""
    return {
        f"{base}.qweight": words(weight.codes.T, 4, AWQ_ORDER),
        f"{base}.qzeros": words(weight.zeros.T, 4, AWQ_ORDER),
        f"{base}.scales": torch.from_numpy(weight.scales.T.copy()),
    }


def gptq_checkpoint(
    folder: Path,
    name: str,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    reordered: bool = False,
    layout: str = "gptq",
) -> Published:
    """A tiny model with all products but head and router in GPTQ's layout, each with a bias of zeros beside it."""
    less = {"gptq": 1, "gptq_v2": 0}[layout]
    tensors, stored, values = _model(folder, name)
    for weight, value in tensors.items():
        base = weight.removesuffix(".weight")
        if is_product(weight):
            made = rounded(value.float().numpy(), bits, group, symmetric=symmetric, reordered=reordered)
            stored |= gptq_parts(base, made, bits, less)
            stored.setdefault(f"{base}.bias", torch.zeros(value.shape[0], dtype=torch.float16))
            values[weight] = made.values
        else:
            stored[weight] = value
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": reordered,
        "checkpoint_format": layout,
    }
    return write_pair(folder, tensors, stored, values, quantization)


def awq_checkpoint(folder: Path, name: str, group: int = 32) -> Published:
    """A tiny model with all products but head and router in AWQ's layout."""
    tensors, stored, values = _model(folder, name)
    for weight, value in tensors.items():
        if is_product(weight):
            made = rounded(value.float().numpy(), 4, group, symmetric=False)
            stored |= awq_parts(weight.removesuffix(".weight"), made)
            values[weight] = made.values
        else:
            stored[weight] = value
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["gate"],
    }
    return write_pair(folder, tensors, stored, values, quantization)


def _model(folder: Path, name: str) -> tuple[Tensors, Tensors, Tensors]:
    save(name, folder / "model", dtype=torch.float16)
    return load_file(folder / "model" / "model.safetensors"), Tensors(), Tensors()


def is_product(name: str) -> bool:
    """Whether packers quantize it: layer 0's queries are kept out, as lists of modules that are not converted do."""
    wanted = (*(f"{part}_proj.weight" for part in ("q", "k", "v", "o", "kv_b")), *EXPERTS)
    return name.endswith(wanted) and ".0.self_attn.q" not in name


EXPERTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
