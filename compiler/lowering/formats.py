"""Which formats of quantized weights the kernels of a target take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.errors import CompileError
from moec.formats import format_of
from moec.formats.record import CODE_BITS

if TYPE_CHECKING:
    from moec.artifacts.model import ModelRecord

EXPERT_CODES: dict[str, frozenset[str]] = {"cpu": frozenset(CODE_BITS), "cuda": frozenset(CODE_BITS)}
"""Kind of target -> ``Format.codes`` that its experts' kernels take."""
DENSE_CODES: dict[str, frozenset[str]] = {"cpu": frozenset(CODE_BITS), "cuda": frozenset(CODE_BITS)}
"""The same for its products in dense segments; rows of tables are looked up in any format."""


def check_formats(model: ModelRecord, kind: str) -> None:
    """Refuse a model with weights in a format that no kernel of this kind of target takes.

    Raises:
        CompileError: it has such weights.
    """
    for body in model.bodies:
        found = format_of(body.format)
        if found is not None and found.codes not in EXPERT_CODES[kind]:
            raise _refused(f"experts in {found.name}", kind)
    for function in model.functions:
        for spec in function.weights:
            found = format_of(spec.format)
            if found is not None and found.codes not in DENSE_CODES[kind]:
                raise _refused(f"products with weights in {found.name}", kind)


def takes_formats(model: ModelRecord, kind: str) -> bool:
    """Whether ``check_formats`` is content."""
    try:
        check_formats(model, kind)
    except CompileError:
        return False
    return True


def _refused(what: str, kind: str) -> CompileError:
    return CompileError(
        f"There is no kernel for {what} on {kind} targets.",
        "The kernels of this version do not read these codes.",
        "Choose another --quantization, or other targets.",
    )
