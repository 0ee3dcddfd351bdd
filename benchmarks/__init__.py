"""Measurements: each prints a table and writes JSON with machine, date and command to ``results/``."""
