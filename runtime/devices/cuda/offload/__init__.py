"""Experts that do not fit the GPU: slots that it manages by itself, host memory that its kernels read, the file."""
