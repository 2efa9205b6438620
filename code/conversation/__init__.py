"""Messages, prompt formats, signal tokens, and their conversion to token ids and batches."""
