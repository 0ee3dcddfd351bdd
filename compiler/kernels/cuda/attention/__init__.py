"""Attention over the paged cache on a GPU: append the step's keys and values, then attend."""

from moec.compiler.kernels.cuda.attention.append import append_kernel
from moec.compiler.kernels.cuda.attention.kernel import attention, has_hopper, workspace

__all__ = ["append_kernel", "attention", "has_hopper", "workspace"]
