"""Losses as pure functions: sums and counts."""
