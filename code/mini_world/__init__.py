"""The mini world: synthetic media of rendered objects with exact ground truth, and its models."""
