"""ImageBind, the frozen media encoder; independent of the system that uses it."""

from nextgpt.model.imagebind.encoder import ImageBind
from nextgpt.model.imagebind.loading import fingerprint, load_imagebind, read_imagebind_config

__all__ = ["ImageBind", "fingerprint", "load_imagebind", "read_imagebind_config"]
