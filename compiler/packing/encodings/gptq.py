"""GPTQ's packed layout (AutoGPTQ, GPTQModel): words of codes along the input, scales and zero points a group.

A product with K inputs and N outputs has ``qweight`` I32 ``[K * bits / 32, N]``, ``scales`` ``[G, N]``, ``qzeros`` I32
``[G, N * bits / 32]`` and ``g_idx`` I32 ``[K]``, the group of each input. In the checkpoint format called ``gptq`` the
zero points are stored less one, in ``gptq_v2`` as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.compiler.packing.encodings.errors import contradicts, misfit, missing, unreadable
from moec.compiler.packing.encodings.integers import (
    BITS,
    SCALE_TYPES,
    WORD,
    IntegerEncoding,
    IntegerRows,
    middle,
    unpack_words,
)
from moec.compiler.packing.encodings.record import Encoded

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from numpy.typing import NDArray

    from moec.compiler.checkpoint.record import TensorEntry
    from moec.compiler.packing.encodings.record import Parts
    from moec.formats import Format

CODES, ZEROS, SCALES, GROUPS = ".qweight", ".qzeros", ".scales", ".g_idx"
STORED_LESS = {"gptq": 1, "gptq_v2": 0}
"""Checkpoint format -> what zero points are stored less."""


@dataclass(frozen=True)
class Gptq(IntegerEncoding):
    """A weight in this layout. Its matrix is stored input-major, and so read whole."""

    name: str
    codes: TensorEntry
    zeros: TensorEntry
    scales: TensorEntry
    groups: TensorEntry | None
    bits: int
    group: int
    """Inputs that share a scale."""
    symmetric: bool
    """All zero points are the code in the middle."""
    reordered: bool
    """Groups are of inputs that do not lie together (``desc_act``)."""
    stored_less: int
    """What zero points are stored less."""
    row_step = 1

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """All that is read."""
        groups = () if self.groups is None else (self.groups,)
        return (self.codes, self.zeros, self.scales, *groups)

    @property
    def columns(self) -> int:
        """K."""
        return self.codes.shape[0] * WORD // self.bits

    @property
    def shared(self) -> int:
        """The group's."""
        return self.group

    @property
    def has_zeros(self) -> bool:
        """Where they are not all the code in the middle."""
        return not self.symmetric

    @property
    def unlike(self) -> str:
        """Groups that are not of neighbours, too."""
        return "groups of columns that do not lie together (desc_act)" if self.reordered else super().unlike

    def packed(self, kind: Format, begin: int, end: int, parts: Parts) -> torch.Tensor:
        """Rows of the same codes and scales.

        Raises:
            CheckpointError: the config says something else of zero points or groups than the tensors.
        """
        rows = self.rows(begin, end, parts)
        assert rows.zeros is not None
        if self.symmetric and (rows.zeros != middle(self.bits)).any():
            raise contradicts(self.name, "Its zero points differ.", "sym", "false")
        if (rows.groups != np.arange(self.columns) // self.group).any():
            raise contradicts(self.name, "Its groups are not of neighbouring inputs.", "desc_act", "true")
        return rows.packed(kind)

    def rows(self, begin: int, end: int, parts: Parts) -> IntegerRows:
        """Of whole matrices."""
        codes = unpack_words(parts.whole(self.codes)[:, begin:end].mT, self.bits)
        zeros = unpack_words(parts.whole(self.zeros), self.bits)[:, begin:end].T
        zeros = (zeros + np.uint8(self.stored_less)) & np.uint8((1 << self.bits) - 1)
        scales = parts.whole(self.scales)[:, begin:end].mT.float().numpy()
        return IntegerRows(self.bits, codes, scales, zeros, self._groups(parts))

    def _groups(self, parts: Parts) -> NDArray[np.int64]:
        if self.groups is None:
            return np.arange(self.columns) // self.group
        groups: NDArray[np.int64] = parts.whole(self.groups).numpy().astype(np.int64)
        if groups.min() < 0 or groups.max() >= self.scales.shape[0]:
            raise misfit(self.name, self.groups, self.scales, "a scale for each group that g_idx names")
        return groups


def find_gptq(index: Mapping[str, TensorEntry], quantization: Mapping[str, Any]) -> dict[str, Encoded]:
    """Every weight of the checkpoint in this layout.

    Raises:
        UnsupportedModelError: codes are of other than 4 or 8 bits, or laid out for a kernel of somebody's.
        CheckpointError: parts are missing or do not fit.
    """
    layout = str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq")
    if quantization.get("is_marlin_format"):
        layout = "marlin"
    if layout not in STORED_LESS:
        raise unreadable(
            f"with GPTQ in the checkpoint format {layout}", f"moec reads {', '.join(STORED_LESS)}."
        )
    overrides = list((quantization.get("dynamic") or {}).values())
    symmetric = all(settings.get("sym", True) for settings in (quantization, *overrides))
    reordered = any(settings.get("desc_act", False) for settings in (quantization, *overrides))
    found: dict[str, Encoded] = {}
    for name in index:
        base = name.removesuffix(CODES)
        if base == name:
            continue
        codes, zeros, scales = (_part(index, base, part) for part in (CODES, ZEROS, SCALES))
        groups = index.get(f"{base}{GROUPS}")
        bits = _bits(base, codes, groups, quantization)
        encoding = Gptq(
            base,
            codes,
            zeros,
            scales,
            groups,
            bits,
            _group(base, codes, scales, bits, quantization),
            symmetric,
            reordered,
            STORED_LESS[layout],
        )
        _check(encoding)
        parts = tuple(f"{base}{part}" for part in (CODES, ZEROS, SCALES, GROUPS) if f"{base}{part}" in index)
        found[f"{base}.weight"] = Encoded(encoding, (codes.shape[1], encoding.columns), parts)
    return found


def _part(index: Mapping[str, TensorEntry], base: str, part: str) -> TensorEntry:
    entry = index.get(f"{base}{part}")
    if entry is None:
        raise missing(f"{base}{part}", f"{base}{CODES}")
    if len(entry.shape) != 2:
        raise misfit(base, entry, entry, f"two dimensions of {part}")
    return entry


def _bits(base: str, codes: TensorEntry, groups: TensorEntry | None, quantization: Mapping[str, Any]) -> int:
    """Of codes: with ``g_idx`` by what a word holds, since a checkpoint may have several widths."""
    bits = int(quantization.get("bits", 4))
    if groups is not None and groups.shape and groups.shape[0] and codes.shape[0]:
        bits, rest = divmod(WORD * codes.shape[0], groups.shape[0])
        if rest:
            raise misfit(base, codes, groups, "a group for each input in g_idx")
    if bits not in BITS:
        raise unreadable(f"with GPTQ to {bits} bits", f"moec reads {' and '.join(map(str, BITS))}.")
    return bits


def _group(
    base: str, codes: TensorEntry, scales: TensorEntry, bits: int, quantization: Mapping[str, Any]
) -> int:
    """Inputs that share a scale; where products differ (``dynamic``), what the number of scales says."""
    columns, count = codes.shape[0] * WORD // bits, scales.shape[0]
    size = int(quantization.get("group_size", -1))
    sizes = [columns if size < 1 else min(size, columns)]
    if quantization.get("dynamic"):
        sizes.append(columns // max(count, 1))
    for group in sizes:
        if group and -(-columns // group) == count:
            return group
    raise misfit(base, codes, scales, f"scales for groups of {size} of {columns} inputs")


def _check(encoding: Gptq) -> None:
    count, rows = encoding.scales.shape[0], encoding.codes.shape[1]
    if encoding.scales.shape[1] != rows or encoding.scales.dtype not in SCALE_TYPES:
        raise misfit(encoding.name, encoding.codes, encoding.scales, f"floating point {(count, rows)}")
    words = (count, rows * encoding.bits // WORD)
    if encoding.zeros.shape != words:
        raise misfit(encoding.name, encoding.codes, encoding.zeros, f"zero points {words}")
    for entry in (encoding.codes, encoding.zeros):
        if entry.dtype not in ("I32", "U32"):
            raise misfit(encoding.name, entry, encoding.scales, "codes in words of 32 bits")
