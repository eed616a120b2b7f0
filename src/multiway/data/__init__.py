"""Data: sources, index, order, views, hiding, batches."""
