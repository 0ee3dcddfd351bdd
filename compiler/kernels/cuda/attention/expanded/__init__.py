"""Attention of the heads that latents stand for: through the latents, or through keys and values made of them."""
