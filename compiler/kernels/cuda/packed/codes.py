"""Codes become pairs of float16 in registers: exactly, several at a time. One emitter for each kind of code.

A word of four codes of 8 bits becomes the pairs (0, 2) and (1, 3) of them; one of eight codes of 4 bits, four columns
in low halves and four in high ones, (0, 2) and (1, 3) of the low ones and then of the high ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.cuda.few.stream import SPLITS
from moec.compiler.kernels.cuda.primitives import value

if TYPE_CHECKING:
    from collections.abc import Callable

    from moec.compiler.kernels.emit import Expr
    from moec.formats.record import Codes, Format

TYPE = "float16"
"""Of the operands of products with packed weights."""
SPLIT = SPLITS[TYPE]
"""How activations become two of them."""
BOTH = 0x00010001
"""Times 16 bits: the same in both halves of a word."""
ONE_THOUSAND = 0x6400
"""1024 in float16: the ten bits of its mantissa count by one."""
SIGNS = 0x8000 * BOTH


@dataclass(frozen=True)
class Widening:
    """How codes become float16."""

    emit: Callable[[Expr, Zero, list[Expr]], list[Expr]]
    """From a word (uint32), the zero point and the masks to words of two float16, 16 bits of code each."""
    factor: float
    """What code values are times the float16: a power of two."""
    masks: tuple[int, ...] = ()
    """Which bits of a word are its codes'."""

    def constant_masks(self) -> list[Expr]:
        """The masks where they are used now and then."""
        return [_word(mask) for mask in self.masks]

    def held_masks(self) -> list[Expr]:
        """The masks in registers, where they are used all the time.

        An instruction takes one constant beside its registers. Of two, the compiler brings one to a register each time:
        one more instruction for each pair of codes.
        """
        return [value("uint32", "held", _word(mask)) for mask in self.masks]


@dataclass(frozen=True)
class Zero:
    """What is subtracted from int4 codes, as two words (uint32) that ``_int4`` takes."""

    low: Expr
    high: Expr

    @classmethod
    def symmetric(cls) -> Zero:
        """The usual one."""
        return cls(_word((ONE_THOUSAND + 8) * BOTH), _word(0xD480 * BOTH))

    @classmethod
    def none(cls) -> Zero:
        """Nothing, for formats with minima."""
        return cls(_word(ONE_THOUSAND * BOTH), _word(0xD400 * BOTH))

    @classmethod
    def of(cls, kind: Format) -> Zero:
        """That of a format without zero points."""
        return cls.none() if kind.minima else cls.symmetric()

    @classmethod
    def at(cls, point: Expr) -> Zero:
        """That of a zero point, uint32."""
        low = (point + _word(ONE_THOUSAND)) * _word(BOTH)
        return cls(T.bind(low), T.bind(((point << _word(4)) + _word(0xD400)) * _word(BOTH)))


def _word(number: int) -> Expr:
    return T.uint32(number)


def _int8(word: Expr, _: Zero, masks: list[Expr]) -> list[Expr]:
    """1152 + q by its bits, less 1152."""
    lifted = [(item & masks[0]) ^ _word(0x6480 * BOTH) for item in (word, T.bind(word >> _word(8)))]
    return [value("uint32", "sub_f16x2", item, _word(0x6480 * BOTH)) for item in lifted]


def _int4(word: Expr, zero: Zero, masks: list[Expr]) -> list[Expr]:
    """1024 + q and 1024 + 16 q by their bits, less 1024 + zero; or a sixteenth of it, less 64 + zero."""
    low, high = [], []
    for item in (word, T.bind(word >> _word(8))):
        bits = (item & masks[0]) | _word(ONE_THOUSAND * BOTH)
        low.append(value("uint32", "sub_f16x2", bits, zero.low))
        bits = (item & masks[1]) | _word(ONE_THOUSAND * BOTH)
        high.append(value("uint32", "fma_f16x2", bits, _word(0x2C00 * BOTH), zero.high))
    return low + high


def _e4m3(word: Expr, _: Zero, __: list[Expr]) -> list[Expr]:
    """Its exponent and mantissa in float16's places: 2^-8 of the value."""
    return [_float(word, 8, 7, 0x3F80), _float(word, 0, -1, 0x3F80)]


def _e2m1(word: Expr, _: Zero, __: list[Expr]) -> list[Expr]:
    """As for e4m3: 2^-14 of the value."""
    return [_float(word, sign, sign - 3, 0x0E00) for sign in (12, 4, 8, 0)]


def _float(word: Expr, sign: int, rest: int, mask: int) -> Expr:
    """The word shifted to the left, by two distances, for the bit of the sign and for the others."""
    return T.bind((_shift(word, sign) & _word(SIGNS)) | (_shift(word, rest) & _word(mask * BOTH)))


def _shift(word: Expr, left: int) -> Expr:
    if left >= 0:
        return word << _word(left) if left else word
    return word >> _word(-left)


WIDENINGS: dict[Codes, Widening] = {
    "int8": Widening(_int8, 1.0, (0xFF * BOTH,)),
    "int4": Widening(_int4, 1.0, (0x0F * BOTH, 0xF0 * BOTH)),
    "e4m3": Widening(_e4m3, 2.0**8),
    "e2m1": Widening(_e2m1, 2.0**14),
}
"""By the name that ``Format.codes`` has."""


def widening(kind: Format) -> Widening:
    """How a format's codes become float16."""
    return WIDENINGS[kind.codes]
