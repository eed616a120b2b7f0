"""Leaf blocks: attention, feed-forward, Multiway, patches, positions, codebooks."""
