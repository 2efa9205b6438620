"""Configuration: the typed schema, the YAML files, and the errors that users see."""

import os

# Libraries read these when they are imported, which is always after this. Without them each model
# that is loaded draws a bar of its own, and diffusers warns of the pipelines that we pin it for.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
