"""The hand-shaped kernels: experts, attention, products. Nothing is imported here, so that this stays light."""
