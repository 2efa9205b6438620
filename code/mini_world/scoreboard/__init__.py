"""The mini world's scoreboard: a rule-based judge scores the system's answers."""
