"""Attention over latents themselves: one wide key head, whose first dimensions are the value too."""
