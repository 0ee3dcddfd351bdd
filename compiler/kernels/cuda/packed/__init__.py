"""Quantized weights on a GPU: rows of packed bytes become tensor cores' operands on the way."""
