"""Products of the dense segments, which may compute their input themselves."""
