"""The model on calibration tokens, run by torch one step at a time from the checkpoint: what flows, and gradients."""
