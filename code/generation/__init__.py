"""Generation: the loaded system, from a conversation to the assistant's next turn."""
