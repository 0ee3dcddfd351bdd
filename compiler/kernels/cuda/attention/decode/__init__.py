"""Attention of few tokens: what each new token attends to is divided over blocks and warps."""
