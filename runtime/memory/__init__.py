"""What a model will take, held against budgets before anything is allocated."""
