"""Other systems on the same machine, the same shapes and the same GPU bytes."""
