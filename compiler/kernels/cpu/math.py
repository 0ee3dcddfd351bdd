"""Elementary functions on float32 vectors, without calls to library functions.

Relative errors are below 3e-7 (exp), 5e-7 (tanh, erf), measured against float64 in tests/kernels.
Polynomials: exp and tanh after Cephes (expf.c, tanhf.c), erf after Eigen's rational approximation on [-4, 4].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.emit import Expr, keep, settle, splat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXP_TERMS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
LEAST_POWER = -87.3365
"""Of e: lesser ones are below 2^-126. What masks leave out of a softmax is far below it, and some processors are slow
with subnormal numbers."""
TANH_TERMS = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
ERF_NUMERATOR = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_DENOMINATOR = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


class VectorMath:
    """Functions of float32 vectors of ``lanes`` lanes (1: scalars)."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes

    def constant(self, value: float) -> Expr:
        """``value`` in every lane."""
        return splat(value, self.lanes)

    def exp(self, x: Expr) -> Expr:
        """e^x; 0 and infinity beyond float32's normal numbers, NaN for NaN."""
        c, x = self.constant, settle(x)
        bounded = keep(T.max(T.min(x, c(88.8)), c(LEAST_POWER)))
        power = keep(T.floor(bounded * c(1.44269504088896341) + c(0.5)))
        rest = keep(bounded - power * c(0.693359375) - power * c(-2.12194440e-4))
        series = keep(self._polynomial(EXP_TERMS, rest) * rest * rest + rest + c(1.0))
        # Two factors, because 2^128 is no number.
        half = keep(T.floor(power * c(0.5)))
        value = series * self._power_of_two(half) * self._power_of_two(power - half)
        return keep(T.Select(self._is_nan(x), x, T.Select(x < c(LEAST_POWER), c(0.0), value)))

    def tanh(self, x: Expr) -> Expr:
        """Hyperbolic tangent."""
        c, x = self.constant, settle(x)
        square = keep(x * x)
        small = self._polynomial(TANH_TERMS, square) * square * x + x
        size = keep(T.max(x, c(0.0) - x))
        large = keep(c(1.0) - c(2.0) / (self.exp(size + size) + c(1.0)))
        signed = T.Select(x < c(0.0), c(0.0) - large, large)
        return keep(T.Select(size < c(0.625), small, T.Select(self._is_nan(x), x, signed)))

    def erf(self, x: Expr) -> Expr:
        """The error function."""
        c, x = self.constant, settle(x)
        bounded = keep(T.max(T.min(x, c(4.0)), c(-4.0)))
        square = keep(bounded * bounded)
        numerator = self._polynomial(ERF_NUMERATOR, square)
        value = bounded * numerator / self._polynomial(ERF_DENOMINATOR, square)
        return keep(T.Select(self._is_nan(x), x, value))

    def sigmoid(self, x: Expr) -> Expr:
        """``1 / (1 + e^-x)``."""
        return keep(self.constant(1.0) / (self.constant(1.0) + self.exp(self.constant(0.0) - x)))

    def silu(self, x: Expr) -> Expr:
        """``x / (1 + e^-x)``; -0 rather than NaN for -infinity's neighbours."""
        x = settle(x)
        return keep(x / (self.constant(1.0) + self.exp(self.constant(0.0) - x)))

    def gelu(self, x: Expr) -> Expr:
        """``x/2 (1 + erf(x / sqrt 2))``."""
        c, x = self.constant, settle(x)
        return keep(c(0.5) * x * (c(1.0) + self.erf(x * c(0.70710678118654752))))

    def gelu_tanh(self, x: Expr) -> Expr:
        """GELU's tanh form."""
        c, x = self.constant, settle(x)
        inner = c(0.79788456080286536) * (x + c(0.044715) * x * x * x)
        return keep(c(0.5) * x * (c(1.0) + self.tanh(inner)))

    def minimum(self, a: Expr, b: Expr) -> Expr:
        """The smaller; NaN where either is."""
        a, b = settle(a), settle(b)
        return keep(T.Select(self._is_nan(a), a, T.Select(b < a, b, T.Select(self._is_nan(b), b, a))))

    def maximum(self, a: Expr, b: Expr) -> Expr:
        """The larger; NaN where either is."""
        a, b = settle(a), settle(b)
        return keep(T.Select(self._is_nan(a), a, T.Select(b > a, b, T.Select(self._is_nan(b), b, a))))

    def operators(self) -> dict[str, Callable[..., Expr]]:
        """Every operator of ``artifacts.activation.ARITY``."""
        zero = self.constant(0.0)
        return {
            "neg": lambda x: zero - x,
            "exp": self.exp,
            "tanh": self.tanh,
            "sigmoid": self.sigmoid,
            "silu": self.silu,
            "relu": lambda x: self.maximum(x, zero),
            "gelu": self.gelu,
            "gelu_tanh": self.gelu_tanh,
            "erf": self.erf,
            "sqrt": lambda x: keep(T.sqrt(x)),
            "add": lambda a, b: keep(a + b),
            "sub": lambda a, b: keep(a - b),
            "mul": lambda a, b: keep(a * b),
            "div": lambda a, b: keep(a / b),
            "min": self.minimum,
            "max": self.maximum,
            "pow": lambda a, b: keep(T.pow(a, b)),
        }

    def _polynomial(self, terms: Sequence[float], x: Expr) -> Expr:
        value = self.constant(terms[0])
        for term in terms[1:]:
            value = value * x + self.constant(term)
        return value

    def _is_nan(self, x: Expr) -> Expr:
        # By its bits: TVM simplifies x != x to false.
        suffix = "" if self.lanes == 1 else f"x{self.lanes}"
        infinity, mask = T.uint32(0x7F800000), T.uint32(0x7FFFFFFF)
        if self.lanes > 1:
            infinity, mask = T.Broadcast(infinity, self.lanes), T.Broadcast(mask, self.lanes)
        return (T.reinterpret(f"uint32{suffix}", x) & mask) > infinity

    def _power_of_two(self, exponent: Expr) -> Expr:
        suffix = "" if self.lanes == 1 else f"x{self.lanes}"
        shift = T.int32(23) if self.lanes == 1 else T.Broadcast(T.int32(23), self.lanes)
        bias = T.int32(127) if self.lanes == 1 else T.Broadcast(T.int32(127), self.lanes)
        bits = (T.cast(exponent, f"int32{suffix}") + bias) << shift
        return T.reinterpret(f"float32{suffix}", bits)
