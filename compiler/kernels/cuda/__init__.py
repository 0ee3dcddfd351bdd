"""Kernels for the CUDA target: plain ones, one thread a result. They are correct; they are not fast yet."""
