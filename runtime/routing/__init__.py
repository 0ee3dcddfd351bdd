"""Which experts tokens choose, recorded, and guessed one MoE layer earlier."""
