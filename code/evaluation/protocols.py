"""The registry of protocols: the tables of the paper (arXiv 2309.05519), and what each measures.

A protocol shows media and asks for a caption, or asks for a medium with a caption. A further one is
an entry here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.common.registry import look_up
from nextgpt.config.schema import Config
from nextgpt.evaluation.benchmark_data import (
    Document,
    read_audiocaps,
    read_coco_test,
    read_coco_val2014,
    read_documents,
    read_msrvtt,
)


@dataclass(frozen=True)
class Protocol:
    """One evaluation.

    Attributes:
        name: on the command line.
        title: for the report.
        task: describe a medium of `modality`, or generate one.
        folder: of the data, in `data.data_dir`/evaluation.
        read: yields media and captions of such a folder.
        metrics: all that it can report, in order.
        paper: the paper's values by metric, in the same units.
    """

    name: str
    title: str
    task: Literal["describe", "generate"]
    modality: Modality
    folder: str
    read: Callable
    metrics: tuple[str, ...]
    paper: Mapping[str, float] = field(default_factory=dict)

    def data_path(self, config: Config, data: Path | None) -> Path:
        """The given data, or the protocol's folder."""
        return data or project_path(config.data.data_dir) / "evaluation" / self.folder

    def documents(self, config: Config, data: Path | None = None) -> list[Document]:
        """Read the documents; see `read_documents`."""
        return read_documents(self.data_path(config, data), self.modality, self.read)


# The paper's values are of its first version (September 2023), tables 3 to 8.
_CAPTIONS = ("BLEU-4", "METEOR-stem", "ROUGE-L", "CIDEr-D")

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "coco_captions", "COCO captions, image to text", "describe", "image",
            "coco", read_coco_test, _CAPTIONS,
            {"BLEU-4": 0.443, "CIDEr-D": 1.567},
        ),
        Protocol(
            "msrvtt_captions", "MSR-VTT captions, video to text", "describe", "video",
            "msrvtt", read_msrvtt, _CAPTIONS,
            {"BLEU-4": 0.584},
        ),
        Protocol(
            "audiocaps_captions", "AudioCaps captions, audio to text", "describe", "audio",
            "audiocaps", read_audiocaps, (*_CAPTIONS, "SBERT-sim"),
            {"CIDEr-D": 0.802},
        ),
        Protocol(
            "coco_images", "COCO images, text to image", "generate", "image",
            "coco", read_coco_val2014, ("FID", "CLIPScore"),
            {"FID": 11.28},
        ),
        Protocol(
            "msrvtt_videos", "MSR-VTT videos, text to video", "generate", "video",
            "msrvtt", read_msrvtt, ("FID", "CLIPSIM"),
            {"FID": 13.04, "CLIPSIM": 0.3085},
        ),
        Protocol(
            "audiocaps_sounds", "AudioCaps sounds, text to audio", "generate", "audio",
            "audiocaps", read_audiocaps, ("FD", "KL", "IS", "CLAP score"),
            {"FD": 23.58, "IS": 8.35},
        ),
    )
}  # fmt: skip


def find_protocol(name: str) -> Protocol:
    """Look up a protocol.

    Raises:
        UserError: an unknown name; suggests the nearest known one.
    """
    return look_up("protocol", name, PROTOCOLS)
