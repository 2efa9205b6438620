"""The mini world's scoreboard: a rule-based judge measures what the system makes."""
