"""How a stage is trained, and what is computed ahead of it."""
