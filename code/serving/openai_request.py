"""The body of a chat completion request, and the settings that follow from it.

Fields of OpenAI's that have no meaning here are ignored, like unknown ones. The settings of the
page are fields too (`extra_body` in OpenAI's package).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nextgpt.common.errors import UserError
from nextgpt.common.modality import Modality
from nextgpt.generation.settings import GenerationSettings
from nextgpt.serving.audio_formats import AudioFormat
from nextgpt.serving.openai_errors import RequestError
from nextgpt.serving.openai_messages import Lenient, Message, check_size
from nextgpt.serving.sampling_settings import SEED_LIMIT, apply_settings, setting_specs

MAX_CHOICES = 4
SEED_STRIDE = 1000  # between choices: medium i of an answer has its seed + i


class StreamOptions(Lenient):
    """Options of a stream."""

    include_usage: bool | None = False


class AudioOptions(Lenient):
    """Options of `message.audio`; a voice is ignored."""

    format: AudioFormat | None = "wav"


class ResponseFormat(Lenient):
    """The form of the answer."""

    type: str = "text"


StopList = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1000)]],
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    Field(max_length=16),
]
ShortText = Annotated[str, Field(max_length=1000)]  # quoted in messages
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]


class CompletionRequest(BaseModel):
    """The body of a request. Other fields are the page's settings, or ignored.

    Attributes:
        content_format: `parts`: the message's `content` is the list of all parts, media included.
    """

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[Message], BeforeValidator(check_size), Field(min_length=1)]
    model: ShortText | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Choices | None = 1
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: StopList | None = None
    modalities: list[ShortText] | None = None
    audio: AudioOptions | None = None
    content_format: Literal["text", "parts"] | None = "text"
    response_format: ResponseFormat | None = None
    tool_choice: Any = None
    function_call: Any = None

    def check_supported(self) -> None:
        """Refuse what this model cannot do.

        Raises:
            RequestError: names the field.
        """
        for name in ("tool_choice", "function_call"):
            if _forces_call(getattr(self, name)):
                message = f"{name}: this model cannot call tools: give none, or leave it out"
                raise RequestError(message, name)
        if self.response_format and self.response_format.type != "text":
            raise RequestError(
                "response_format: this model answers in free text and media, not in JSON: give "
                "text, or leave it out",
                "response_format",
            )

    def settings(self, defaults: GenerationSettings) -> GenerationSettings:
        """Override the defaults with the request's settings.

        A longest answer beyond the limit is lowered to it, and nucleus sampling without a nucleus
        is greedy.

        Raises:
            RequestError: names the field.
        """
        values = self.model_dump(exclude={"messages"})
        limits = {spec.name: spec for spec in setting_specs(defaults)}
        greedy = self.top_p is not None and 0 <= self.top_p < limits["top_p"].low
        if greedy:
            values |= {"temperature": 0, "top_p": None}
        settings = apply_fields(defaults, {name: values.get(name) for name in limits})
        longest = self.max_completion_tokens or self.max_tokens
        if longest is not None:
            highest = int(limits["max_new_tokens"].high)
            settings = replace(settings, max_new_tokens=min(longest, highest))
        return replace(
            settings,
            stop=tuple(self.stop or ()),
            modalities=self._modalities(defaults),
        )

    def _modalities(self, defaults: GenerationSettings) -> frozenset[Modality] | None:
        if self.modalities is None:
            return None
        known = ["text", *defaults.decode]
        for name in self.modalities:
            if name not in known:
                message = f"modalities: {name!r} is not one of {', '.join(known)}"
                raise RequestError(message, "modalities")
        return frozenset(self.modalities) - {"text"}


def _forces_call(choice: Any) -> bool:
    match choice:
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode}}:
            return mode != "auto"
        case {"type": "none" | "auto"}:
            return False
    return choice not in (None, "none", "auto")


def apply_fields(
    defaults: GenerationSettings, values: Mapping[str, Any], fields: Mapping[str, str] | None = None
) -> GenerationSettings:
    """Override `defaults` with fields of a request; None keeps a default.

    Args:
        defaults: of all settings.
        values: by the settings' names.
        fields: names of the request's fields, where they differ from the settings'.

    Raises:
        RequestError: names the field and its range.
    """
    settings = defaults
    for name, value in values.items():
        try:
            settings = apply_settings(settings, {name: value})
        except UserError as error:
            field = (fields or {}).get(name, name)
            raise RequestError(str(error).replace(name, field), field) from error
    return settings


def choice_seeds(seed: int | None, count: int, random: int) -> list[int]:
    """Return the seeds of `count` answers, from any whole number; `random` if it is None or -1."""
    first = random if seed is None or seed == -1 else seed
    return [(first + number * SEED_STRIDE) % SEED_LIMIT for number in range(count)]
