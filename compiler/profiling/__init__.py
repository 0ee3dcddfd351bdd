"""Which experts fire together, and after which: routing traces from calibration prompts."""
