"""Routed experts in memory: which are resident, where kernels find them, what is brought before it is asked for."""
