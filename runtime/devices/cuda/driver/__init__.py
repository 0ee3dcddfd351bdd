"""The CUDA driver as typed functions, and what is taken from it: memory, streams, events, within a hard limit."""
