"""What the benchmarks share: processes, clocks, references, budgets, and where results go."""
