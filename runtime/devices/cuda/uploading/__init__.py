"""Weights from files to a GPU."""
