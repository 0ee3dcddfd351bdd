"""Formats of weights for a target: what there is to choose from, what a choice loses, and the choice of least loss."""
