"""NVIDIA GPUs: the driver through cuda-bindings, TVM's small CUDA library for launching, nothing else."""
