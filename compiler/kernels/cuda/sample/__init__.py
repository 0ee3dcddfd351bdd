"""The kernel that chooses tokens on a GPU, in three launches: score, histogram, pick."""

from moec.compiler.kernels.cuda.sample.kernel import sample

__all__ = ["sample"]
