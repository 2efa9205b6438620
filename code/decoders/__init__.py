"""Frozen diffusion decoders: adapters of diffusers pipelines and their text encoders."""
