"""Media files: decoding in a worker process, transforms for ImageBind, feature cache, writing."""
