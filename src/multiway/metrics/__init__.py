"""Figures of merit in numpy, each with what chance would reach."""
