"""Media files: decoding in subprocesses, ImageBind's preprocessing, feature cache, writing."""
