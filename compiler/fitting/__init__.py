"""Stage ``fit``: which formats meet a target at the least loss, from what is measured on the calibration set."""

from moec.compiler.fitting.fit import fit

__all__ = ["fit"]
