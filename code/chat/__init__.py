"""Chat: the system loaded once, then turn in, turn out; its history as a file."""
