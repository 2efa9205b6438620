"""The frozen encoder, by itself: it knows nothing of the system that uses it."""

from model.imagebind.encoder import ImageBind
from model.imagebind.loading import encoder_figures, fingerprint, load_imagebind

__all__ = ["ImageBind", "encoder_figures", "fingerprint", "load_imagebind"]
