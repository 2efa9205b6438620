"""Training callbacks: warm starts of new projections, and the hidden-state cache."""
