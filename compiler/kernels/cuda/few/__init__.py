"""Products of at most eight tokens: weights streamed through registers once, for all of them."""
