"""Conversations: what the system reads, and how a conversation becomes token ids."""
