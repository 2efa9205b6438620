"""Names of a configuration's pretrained components."""

from nextgpt.common.modality import MODALITIES
from nextgpt.config.schema import Config

PartName = str
PART_NAMES: tuple[PartName, ...] = ("encoder", "language_model", *MODALITIES, "tuned")


def configured_path(config: Config, part: PartName) -> str:
    """Return the configured path or hub name of `part`."""
    if part == "tuned":
        return config.save_path
    if part in MODALITIES:
        return config.decoders[part].path
    return config.encoder.path if part == "encoder" else config.language_model.path
