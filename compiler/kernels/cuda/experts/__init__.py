"""Routed experts: each token's chosen ones, read through a table of addresses."""
