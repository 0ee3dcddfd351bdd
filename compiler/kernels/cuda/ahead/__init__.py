"""Guessing the next MoE layer's experts on the GPU, and bringing pieces of them while the link is free."""
