"""The mini world: a closed world of things, rendered by code, where every claim is measurable."""
