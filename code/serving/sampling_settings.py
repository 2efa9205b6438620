"""The knobs: what people may set for an answer, and how far; page and APIs use one table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.generation.settings import GenerationSettings
from nextgpt.model.decoders import DecoderOption

SEED_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class SettingSpec:
    """A figure that may be set.

    Attributes:
        name: as the APIs know it.
        group, label: for people.
        low, high, step: the range, ends included; whole numbers if `step` is one.
        value: the configuration's own.
    """

    name: str
    group: str
    label: str
    low: float
    high: float
    step: float
    value: float


def setting_specs(options: GenerationSettings) -> list[SettingSpec]:
    """All knobs; a range reaches as far as the configuration's own figure, if that is outside."""
    words = [
        _spec("top_p", "Words", "top-p", 0.01, 1, 0.01, options.top_p),
        _spec("temperature", "Words", "temperature", 0, 2, 0.05, options.temperature),
        _spec("max_new_tokens", "Words", "longest answer (tokens)", 16, 512, 1,
              options.max_new_tokens),
    ]  # fmt: skip
    return words + [
        _spec(name, MODALITIES[modality].display_name.capitalize(), one.label, one.low, one.high,
              one.step, getattr(options.decode[modality], one.field))
        for name, (modality, one) in _decoder_options(options).items()
    ]  # fmt: skip


def _decoder_options(options: GenerationSettings) -> dict[str, tuple[Modality, DecoderOption]]:
    """The decoders' options by the knobs' names, those without a value left out."""
    return {
        f"{option.name}_{modality}": (modality, option)
        for modality, decode in options.decode.items()
        for option in MODALITIES[modality].decoder_class.options
        if getattr(decode, option.field) is not None
    }


def _spec(
    name: str, group: str, label: str, low: float, high: float, step: float, value: float
) -> SettingSpec:
    return SettingSpec(name, group, label, min(low, value), max(high, value), step, value)


def apply_settings(options: GenerationSettings, values: Mapping[str, Any]) -> GenerationSettings:
    """`options` with what is set in `values`, by the knobs' names; None leaves a knob alone.

    Raises:
        UserError: naming the knob and its range.
    """
    known = {knob.name: knob for knob in setting_specs(options)}
    of_decoders = _decoder_options(options)
    words: dict[str, Any] = {}
    decode = dict(options.decode)
    for name, value in values.items():
        if name not in known:
            raise UserError(f"there is no knob {name!r}: the knobs are {', '.join(known)}")
        if value is None:
            continue
        value = _within(known[name], value)
        if name in of_decoders:
            modality, option = of_decoders[name]
            decode[modality] = replace(decode[modality], **{option.field: value})
        else:
            words[name] = value
    return replace(options, **words, decode=decode)


def check_seed(seed: Any) -> int | None:
    """A seed, or none where it is -1 or left out.

    Raises:
        UserError: out of range.
    """
    if seed is None or seed == -1:
        return None
    return int(_within(SettingSpec("seed", "", "", 0, SEED_LIMIT, 1, 0), seed))


def _within(knob: SettingSpec, value: Any) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not knob.low <= value <= knob.high:
        raise UserError(f"{knob.name} {value!r}: give {knob.low:g} to {knob.high:g}")
    if knob.step == 1:
        if value != int(value):
            raise UserError(f"{knob.name} {value!r}: give a whole number")
        return int(value)
    return float(value)
