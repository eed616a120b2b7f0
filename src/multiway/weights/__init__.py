"""Weights: reading, writing, renaming."""
