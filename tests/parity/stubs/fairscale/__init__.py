"""Stands in for fairscale, which torchscale imports for two wrappers that are off by default."""
