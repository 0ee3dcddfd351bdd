"""Traces, byte budgets and a machine's speeds in, a schedule out: pure, no clock, no device; needs no compiler."""
