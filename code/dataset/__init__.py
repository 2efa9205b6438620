"""Data sets: catalog, readers, row index, shards, caption embeddings, batch schedule."""
