"""Embedding and exact search, over any model that makes vectors."""
