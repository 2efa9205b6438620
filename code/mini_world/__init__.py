"""The mini world: a closed world of things, rendered by code, where every claim is measurable."""

import model  # noqa: F401  (quiets libraries, before they are loaded)
