"""Measures what the system makes: the judge reads it, by rules, and learns nothing."""
