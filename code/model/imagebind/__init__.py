"""The frozen encoder, by itself: it knows nothing of the system that uses it."""

from model.imagebind.encoder import ImageBind
from model.imagebind.loading import fingerprint, load_imagebind

__all__ = ["ImageBind", "fingerprint", "load_imagebind"]
