"""Kernels for the CUDA target, a room a family; here what all of them are written in."""
