"""Formats of quantized weights: what their bytes mean, how they lie in a row, and their reference in numpy."""

from moec.formats.methods import CALIBRATED, METHODS, Method
from moec.formats.record import ALIASES, FORMATS, PLAIN, Format, format_of
from moec.formats.reference import dequantize, dequantize_rows
from moec.formats.rows import Quantized, RowLayout, pack_rows, row_bytes, row_layout, unpack_rows

__all__ = [
    "ALIASES",
    "CALIBRATED",
    "FORMATS",
    "METHODS",
    "PLAIN",
    "Format",
    "Method",
    "Quantized",
    "RowLayout",
    "dequantize",
    "dequantize_rows",
    "format_of",
    "pack_rows",
    "row_bytes",
    "row_layout",
    "unpack_rows",
]
