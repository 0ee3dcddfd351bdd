"""Rows of values to rows of codes, on the way from the checkpoint into the bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moec.errors import BundleError, CheckpointError
from moec.formats import FORMATS, METHODS, pack_rows

if TYPE_CHECKING:
    from moec.artifacts.quantization import Quantization
    from moec.formats import Format, Method


@dataclass(frozen=True)
class Quantizer:
    """Makes a matrix's rows in one format, some at a time; it may be used in several threads at once."""

    kind: Format
    method: Method

    def rows(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """Packed rows, uint8 ``[n, row_bytes]``, of values ``[n, K]`` of any type.

        Raises:
            CheckpointError: a value of the tensor ``name`` is NaN or infinite.
        """
        try:
            quantized = self.method(self.kind, values.float().numpy())
        except ValueError as error:
            raise not_stored(name, self.kind, error) from error
        return torch.from_numpy(pack_rows(self.kind, quantized))


def not_stored(name: str, kind: Format, error: ValueError) -> CheckpointError:
    """A method did not take the values of the tensor ``name``."""
    return CheckpointError(
        f"Tensor {name} cannot be stored as {kind.name}.",
        f"{str(error)[0].upper()}{str(error)[1:]}.",
        "Leave it plain with a rule in a file for --quantization, or use another checkpoint.",
    )


def quantizer_for(name: str, policy: Quantization | None) -> Quantizer:
    """What makes weights of the format called ``name`` by the policy's method.

    Raises:
        BundleError: there is no such format, or the policy has no method that this moec knows.
    """
    if name not in FORMATS or policy is None or policy.method not in METHODS:
        raise BundleError(
            f"packing.json does not say how weights become {name}.",
            f"Its method is {policy.method if policy else 'none'}; this moec knows {', '.join(METHODS)}.",
            "Make the modules again with moec compile --modules-only.",
        )
    return Quantizer(FORMATS[name], METHODS[policy.method])
