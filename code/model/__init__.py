"""The model and its components."""
