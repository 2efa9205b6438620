"""Pretrained weights: registry of sources, checks, download, merging."""
