"""Metrics that any evaluation uses."""
