"""The mini world: a closed world of objects, rendered by code, where every claim is measurable."""
