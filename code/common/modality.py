"""The modalities besides text."""

from typing import Literal, get_args

Modality = Literal["image", "video", "audio"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
