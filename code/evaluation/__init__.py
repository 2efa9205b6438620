"""Metrics shared by all evaluations."""
