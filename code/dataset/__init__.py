"""Data sets, and the media in them."""
