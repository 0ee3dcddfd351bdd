"""The words of memory that kernels and the host share while a model runs: what lies where, and what it means."""
