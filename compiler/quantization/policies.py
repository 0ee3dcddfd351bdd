"""The policies behind ``--quantization NAME``, and the file behind ``--quantization FILE``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.artifacts.files.records import read_record
from moec.artifacts.quantization import KEEP, ROLES, Quantization, quantization_problems
from moec.errors import BundleError, UsageError
from moec.formats import ALIASES, FORMATS, METHODS

if TYPE_CHECKING:
    from pathlib import Path

METHOD = "nearest"
BYTE_FORMAT = "int8-g128"
"""For dense weights beside routed experts of 4 bits: they are read for every token, and are a small part of all."""

NONE = "none"
POLICIES = (NONE, KEEP, *ALIASES, *FORMATS)
"""Names that ``policy_named`` knows: ``none``, ``keep``, and those of formats."""


def policy_named(name: str) -> Quantization:
    """The recipe called like the format of its routed experts; ``none``: no formats; ``keep``: those of the checkpoint.

    All other products, the embedding and the head get 8 bits, the router stays as it is: it is small, and an expert
    chosen wrongly is a large error.
    """
    if name in (NONE, KEEP):
        return Quantization(name, METHOD, dict.fromkeys(ROLES, KEEP) if name == KEEP else {}, ())
    kind = FORMATS[ALIASES.get(name, name)]
    dense = kind.name if kind.bits > 4 else BYTE_FORMAT
    roles = {"experts": kind.name, "linear": dense, "embedding": dense, "head": dense}
    return Quantization(name, METHOD, roles, ())


def read_policy(path: Path) -> Quantization:
    """The policy in a file.

    Raises:
        UsageError: it is not there or not of the form that its schema says, or it names a format, role or method
            that does not exist.
    """
    do = "Correct it; docs/quantization.md has an example."
    try:
        policy = read_record(Quantization, "quantization", path)
    except BundleError as error:
        raise UsageError(error.what, error.why, do) from error
    problems = quantization_problems(policy, tuple(METHODS))
    if problems:
        what = f"The quantization in {path} cannot be used."
        raise UsageError(what, f"{problems[0][0].upper()}{problems[0][1:]}.", do)
    return policy
