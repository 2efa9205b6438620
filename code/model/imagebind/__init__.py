"""The frozen encoder, by itself: it knows nothing of the system that uses it."""
