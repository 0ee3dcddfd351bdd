"""Random weights of a real model's shape, as fast as memory: a checkpoint, or straight into a bundle."""
