"""Requests for a single image, video or sound, in the forms of OpenAI and vLLM-Omni.

The prompt is sent to the language model as a request for that medium, in the words of
`serving.task_prompts`, so that it gets what the chat would draw, film or play.
"""

import re
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, Field

from nextgpt.common.modality import Modality
from nextgpt.decoders.pipelines import DiffusionSettings
from nextgpt.generation.settings import GenerationSettings
from nextgpt.serving.audio_formats import AudioFormat
from nextgpt.serving.openai_errors import RequestError
from nextgpt.serving.openai_messages import Lenient
from nextgpt.serving.openai_request import Choices, ShortText, apply_fields

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)
Seconds = Annotated[float, Field(gt=0, le=600)]
OneChoice = Annotated[int, Field(ge=1, le=1)]
_DEFAULT_SIZES = (None, "", "auto")


def _aliased(*names: str) -> Any:
    return Field(default=None, validation_alias=AliasChoices(*names))


class TaskRequest(Lenient):
    """A request for a medium of `modality`; other fields are ignored."""

    modality: ClassVar[Modality]

    prompt: str = Field(min_length=1, validation_alias=AliasChoices("prompt", "input"))
    model: ShortText | None = None
    n: Choices | None = 1
    seed: int | None = None
    num_inference_steps: int | None = _aliased("num_inference_steps", "steps")
    guidance_scale: float | None = _aliased("guidance_scale", "guidance")
    size: ShortText | None = None

    def decoder_fields(self, decode: DiffusionSettings) -> dict[str, tuple[str, float | None]]:
        """Return name and value of the fields for the decoder, by its options' names."""
        return {
            "steps": ("num_inference_steps", self.num_inference_steps),
            "guidance": ("guidance_scale", self.guidance_scale),
        }

    def settings(self, defaults: GenerationSettings, max_pixels: int) -> GenerationSettings:
        """Override the defaults with the request's settings; only its modality is decoded.

        Raises:
            RequestError: names the field.
        """
        modality = self.modality
        if modality not in defaults.decode:
            raise RequestError(f"this server makes no {modality}", "model", 404, "model_not_found")
        fields = self.decoder_fields(defaults.decode[modality])
        settings = apply_fields(
            defaults,
            {f"{option}_{modality}": value for option, (_, value) in fields.items()},
            {f"{option}_{modality}": field for option, (field, _) in fields.items()},
        )
        decode = _with_size(settings.decode[modality], self.size, max_pixels)
        return replace(
            settings,
            decode={**settings.decode, modality: decode},
            modalities=frozenset({modality}),
        )


class ImageRequest(TaskRequest):
    """The body of `/v1/images/generations`."""

    modality: ClassVar[Modality] = "image"

    response_format: Literal["b64_json", "url"] | None = "b64_json"


class VideoRequest(TaskRequest):
    """The body of `/v1/videos` and `/v1/videos/sync`, JSON or a form."""

    modality: ClassVar[Modality] = "video"

    n: OneChoice | None = 1
    num_frames: int | None = None
    seconds: Seconds | None = None

    def decoder_fields(self, decode: DiffusionSettings) -> dict[str, tuple[str, float | None]]:
        """Frames, or as many as fill the seconds."""
        frames: tuple[str, float | None] = ("num_frames", self.num_frames)
        if self.num_frames is None and self.seconds is not None:
            frames = ("seconds", max(1, round(self.seconds * decode.fps)))
        return super().decoder_fields(decode) | {"frames": frames}


class SoundRequest(TaskRequest):
    """The body of `/v1/audio/generations`."""

    modality: ClassVar[Modality] = "audio"

    n: OneChoice | None = 1
    seconds: Seconds | None = None
    response_format: AudioFormat | None = "wav"

    def decoder_fields(self, decode: DiffusionSettings) -> dict[str, tuple[str, float | None]]:
        """The seconds."""
        return super().decoder_fields(decode) | {"seconds": ("seconds", self.seconds)}


def _with_size(decode: DiffusionSettings, size: str | None, max_pixels: int) -> DiffusionSettings:
    if size in _DEFAULT_SIZES:
        return decode
    found = _SIZE.fullmatch(size or "")
    width, height = map(int, found.groups()) if found else (0, 0)
    if not found or width % 8 or height % 8 or not 0 < width * height <= max_pixels:
        raise RequestError(
            f"size {size!r}: give auto, or WIDTHxHEIGHT in multiples of 8 with at most {max_pixels}"
            " pixels",
            "size",
        )
    return replace(decode, width=width, height=height)


def format_size(decode: DiffusionSettings) -> str:
    """Return the size of a frame as `WIDTHxHEIGHT`, or `auto` for the decoder's own."""
    return f"{decode.width}x{decode.height}" if decode.width and decode.height else "auto"
