"""Backbones: built blocks in a row; no settings, no papers."""
