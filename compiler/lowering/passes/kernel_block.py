"""A hand-written kernel in the form that TVM's Relax passes expect of every function."""

from __future__ import annotations

from tvm import s_tir, tirx


def as_private_block(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """``kernel`` within one opaque block, and private, so that it is dropped where nothing calls it.

    Passes that look for reshapes or element-wise functions take a body that is no block for a bug.
    """
    block = s_tir.SBlock([], [], [], "moec_kernel", kernel.body)
    private = kernel.with_body(s_tir.SBlockRealize([], True, block)).without_attr("global_symbol")
    return private.with_attr("tirx.is_scheduled", True)
