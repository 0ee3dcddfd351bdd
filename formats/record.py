"""The formats as records. One with codes that exist already is added here, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Codes: TypeAlias = Literal["int8", "int4", "e4m3", "e2m1"]
Scale: TypeAlias = Literal["float16", "float32", "e8m0"]

CODE_BITS: dict[Codes, int] = {"int8": 8, "int4": 4, "e4m3": 8, "e2m1": 4}
SCALE_BYTES: dict[Scale, int] = {"float16": 2, "float32": 4, "e8m0": 1}
PLAIN = ("bfloat16", "float16", "float32")
"""Element types of weights that are not quantized."""


@dataclass(frozen=True)
class Format:
    """How the values of a weight matrix are stored: a code each, and a scale for each group of a row's columns.

    ======  ============================================================================
    codes   value of code q (s: the group's scale, z: its zero point)
    ======  ============================================================================
    int8    ``s * q``, q in -128 .. 127; rounding leaves -128 out
    int4    ``s * (q - 8)``, or with zero points ``s * (q - z)``; q and z in 0 .. 15;
            with minima ``s * q + m`` (m: the group's minimum)
    e4m3    ``s * value``: FP8 of the Open Compute Project (OFP8 1.0), no infinities
    e2m1    ``s * value``: FP4 of OCP Microscaling Formats 1.0
    ======  ============================================================================

    A scale of type ``e8m0`` is ``2 ** (byte - 127)``, where the byte 255 is NaN. Others may be negative.
    """

    name: str
    codes: Codes
    group: int
    """Columns that share a scale: a power of two from 32."""
    scale: Scale
    zero_points: bool = False
    """A byte for each group; only with ``int4``."""
    minima: bool = False
    """A float16 for each group; only with ``int4``, without zero points."""

    @property
    def offset_bytes(self) -> int:
        """Of a group's zero point or minimum."""
        return 2 if self.minima else int(self.zero_points)

    @property
    def bits(self) -> int:
        """Of a code: 8 or 4."""
        return CODE_BITS[self.codes]


_GROUPS = (32, 64, 128)
_RECORDS = (
    *(Format(f"int8-g{group}", "int8", group, "float16") for group in _GROUPS),
    *(Format(f"int4-g{group}", "int4", group, "float16") for group in _GROUPS),
    *(Format(f"int4-g{group}-z", "int4", group, "float16", zero_points=True) for group in _GROUPS),
    Format("int4-g32-m", "int4", 32, "float16", minima=True),
    Format("fp8-e4m3", "e4m3", 128, "float32"),
    Format("mxfp4", "e2m1", 32, "e8m0"),
)
FORMATS: dict[str, Format] = {record.name: record for record in _RECORDS}
ALIASES: dict[str, str] = {"int8": "int8-g128", "int4": "int4-g32", "fp8": "fp8-e4m3"}
"""Shorter names, for the command line: bundles have the long ones."""


def format_of(name: str | None) -> Format | None:
    """The format called ``name``; None for None and for the name of a plain element type.

    Raises:
        KeyError: there is no such format.
    """
    return None if name is None or name in PLAIN else FORMATS[ALIASES.get(name, name)]
