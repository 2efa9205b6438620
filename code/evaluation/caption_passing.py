"""Caption passing: a decoder is given a caption through its own text encoder.

The alternative to the output projections: the language model writes a caption, which is decoded in
place of the projected signal tokens. With the true captions it is the decoder's ceiling.
"""

from collections.abc import Sequence
from dataclasses import replace

from nextgpt.common.modality import Modality
from nextgpt.conversation.messages import ContentPart, Media, Text
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.writing import Output


def decode_captions(
    assistant: Assistant,
    modality: Modality,
    captions: Sequence[str],
    seeds: Sequence[int],
    settings: GenerationSettings,
) -> list[Output]:
    """Decode unmodified captions, embedded by the decoder's text encoder."""
    decoder = assistant.load_decoder(modality)
    embeddings = decoder.text_encoder.encode(captions)
    return decoder.decode(embeddings, replace(settings.decode[modality], seed=tuple(seeds)))


def written_caption(parts: Sequence[ContentPart], kind: str) -> str:
    """Return the caption of the first medium of `kind`: the preceding text after the last colon."""
    for before, part in zip(("", *parts), parts, strict=False):
        if isinstance(part, Media) and part.modality == kind:
            return before.text.split(":")[-1].strip(" .") if isinstance(before, Text) else ""
    return ""
