"""Operators whose loops we make otherwise than TVM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm import topi

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

INJECTIVE = 2
"""TVM's word for a loop in which each result is one element of an input: what follows fuses with it."""


def _take(builder: Any, call: Any) -> Any:
    """TVM takes a loop that looks its index up for opaque: rows of a table would be cast in a loop of their own."""
    return builder.call_te(
        topi.take,
        *call.args,
        call.attrs.axis,
        mode=call.attrs.mode,
        primfunc_attrs={"op_pattern": INJECTIVE},
    )


LEGALIZATIONS: Mapping[str, Callable[[Any, Any], Any]] = {"relax.take": _take}
"""Relax operator to ``(block builder, call) -> call of loops``."""
