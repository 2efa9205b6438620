"""Training: data loading, the DeepSpeed engine, the trainer, exact resume."""
