"""Training: samples and features made ready, the DeepSpeed agent, the loop, exact resume."""
