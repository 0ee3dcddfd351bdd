"""Kernels for the LLVM target, as factories of TIRx PrimFuncs."""
