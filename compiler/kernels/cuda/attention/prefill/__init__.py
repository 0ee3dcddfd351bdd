"""Attention of many tokens: flash attention on tensor cores."""
