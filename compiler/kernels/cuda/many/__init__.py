"""Products of many tokens on tensor cores: tiles of both operands in shared memory."""
