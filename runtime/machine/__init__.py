"""This machine: its memory, its threads, and the modules that its CPU can run."""
