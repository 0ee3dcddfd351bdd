"""What a machine takes for it: a decoded token, a step of many, the same over budgets, and whether guessing gains."""
