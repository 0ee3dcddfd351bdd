"""Rewrites of every Relax function of a module."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax


def rewrite_functions(module: tvm.IRModule, rewriter: Any) -> tvm.IRModule:
    """``module`` with what ``rewriter``, a ``PyExprMutator`` made for it, makes of its Relax functions."""
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            rewriter.builder_.update_func(name, rewriter.visit_expr(function))
    return rewriter.builder_.get()
