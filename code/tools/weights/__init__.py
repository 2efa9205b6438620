"""Pretrained weights of others: where they are, whether they are right, download and merging."""
