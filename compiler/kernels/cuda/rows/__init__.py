"""Regions: rows of tensors between products, made by the threads of one block each."""
