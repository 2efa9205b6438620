"""The settings that people may change for an answer, with their ranges: one table for all APIs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nextgpt.common.errors import UserError, shown
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.decoders.pipelines import DecoderOption
from nextgpt.generation.settings import GenerationSettings

SEED_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class SettingSpec:
    """A number that may be set.

    Attributes:
        name: in the APIs.
        group, label: on the page.
        low, high, step: the range, ends included; whole numbers if `step` is one.
        default: the configuration's.
    """

    name: str
    group: str
    label: str
    low: float
    high: float
    step: float
    default: float


def setting_specs(defaults: GenerationSettings) -> list[SettingSpec]:
    """List all settings; a range is extended to the configuration's value, if that is outside."""
    specs = [
        _spec("top_p", "Words", "top-p", 0.01, 1, 0.01, defaults.top_p),
        _spec("temperature", "Words", "temperature", 0, 2, 0.05, defaults.temperature),
        _spec("max_new_tokens", "Words", "longest answer (tokens)", 16, 512, 1,
              defaults.max_new_tokens),
    ]  # fmt: skip
    return specs + [
        _spec(name, MODALITIES[modality].display_name.capitalize(), option.label, option.low,
              option.high, option.step, getattr(defaults.decode[modality], option.field))
        for name, (modality, option) in _decoder_options(defaults).items()
    ]  # fmt: skip


def _decoder_options(defaults: GenerationSettings) -> dict[str, tuple[Modality, DecoderOption]]:
    """The decoders' options by the settings' names; those without a value are left out."""
    return {
        f"{option.name}_{modality}": (modality, option)
        for modality, decode in defaults.decode.items()
        for option in MODALITIES[modality].decoder_class.options
        if getattr(decode, option.field) is not None
    }


def _spec(
    name: str, group: str, label: str, low: float, high: float, step: float, default: float
) -> SettingSpec:
    return SettingSpec(name, group, label, min(low, default), max(high, default), step, default)


def apply_settings(defaults: GenerationSettings, values: Mapping[str, Any]) -> GenerationSettings:
    """Override `defaults` with `values`, by the settings' names; None keeps a default.

    Raises:
        UserError: names the setting and its range.
    """
    specs = {spec.name: spec for spec in setting_specs(defaults)}
    of_decoders = _decoder_options(defaults)
    sampling: dict[str, Any] = {}
    decode = dict(defaults.decode)
    for name, value in values.items():
        if name not in specs:
            raise UserError(f"unknown setting {name!r}: the settings are {', '.join(specs)}")
        if value is None:
            continue
        value = _validate(specs[name], value)
        if name in of_decoders:
            modality, option = of_decoders[name]
            decode[modality] = replace(decode[modality], **{option.field: value})
        else:
            sampling[name] = value
    return replace(defaults, **sampling, decode=decode)


def check_seed(seed: Any) -> int | None:
    """Return a valid seed, or None if it is -1 or missing.

    Raises:
        UserError: out of range.
    """
    if seed is None or seed == -1:
        return None
    return int(_validate(SettingSpec("seed", "", "", 0, SEED_LIMIT, 1, 0), seed))


def _validate(spec: SettingSpec, value: Any) -> float:
    valid = isinstance(value, int | float) and not isinstance(value, bool)
    if not valid or not spec.low <= value <= spec.high:  # of NaN neither
        raise UserError(f"{spec.name} {shown(value)}: give {spec.low:g} to {spec.high:g}")
    if spec.step == 1:
        if value != int(value):
            raise UserError(f"{spec.name} {value}: give a whole number")
        return int(value)
    return float(value)
