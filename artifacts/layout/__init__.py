"""Arithmetic on a model's record that both programs share: what lies where, and how many bytes it takes."""
