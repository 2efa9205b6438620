"""Tools around training: memory estimate, caption embeddings, data validation, weights."""
