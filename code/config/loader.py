"""Load the configuration: base.yaml, the stage's YAML, the named YAML, then `--set key=value`.

Later layers override earlier ones. A named YAML may have sections `stage_1` to `stage_4`, which
apply to that stage only.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nextgpt.common.errors import UserError, shorten, shown
from nextgpt.config.renamed_keys import update_keys
from nextgpt.config.schema import DATASET_TAGS, Config

CONFIG_DIR = Path(__file__).parent
STAGES = (1, 2, 3, 4)
_MAX_VALUES = 10_000  # of a YAML file: far more than there are keys
_MAX_BITS = 64  # of a whole number
_MAX_LEVELS = 10  # of sections
_MAX_LISTED = 20  # faults in an error message
# PyYAML's constructors check neither numbers and dates nor the depth of lists.
_YAML_ERRORS = (
    yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError,
    RecursionError,
)  # fmt: skip


def load_config(
    name: str, stage: int | None = None, overrides: Sequence[str] | None = None
) -> Config:
    """Load and validate the configuration `name`.

    Args:
        name: `mini`, `7b` or another YAML file of this folder, or the path of one.
        stage: 1 to 4 for training; None for inference.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        UserError: an unknown or ill-typed key; names the file, the key and the closest valid key.
    """
    layers = [_read_yaml(CONFIG_DIR / "base.yaml")]
    if stage is not None:
        layers.append(_read_yaml(CONFIG_DIR / f"stage_{stage}.yaml"))
    source, named = _read_yaml(_find(name))
    by_stage = {number: named.pop(f"stage_{number}", None) or {} for number in STAGES}
    for number, section in by_stage.items():
        if not isinstance(section, dict):
            raise UserError(f"{source}: stage_{number} holds no keys: expected `section:` lines")
    layers.append((source, named))
    if stage is not None:
        layers.append((f"{source}, section stage_{stage}", by_stage[stage]))
    layers += [_parse_override(override) for override in overrides or ()]

    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, layer in layers:
        for note in update_keys(layer, source):
            print(note, file=sys.stderr)
        _merge(values, layer, source, origins)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        faults = [_explain(item, origins) for item in error.errors()]
        if (more := len(faults) - _MAX_LISTED) > 0:
            faults = [*faults[:_MAX_LISTED], f"... and {more} more"]
        raise UserError("\n".join(faults)) from None


def format_config(config: Config) -> str:
    """Format a resolved configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def add_config_arguments(parser: argparse.ArgumentParser, default: str = "mini") -> None:
    """Add `--config`, `--set` and `--print-config`; `load_config_from` evaluates them."""
    parser.add_argument("--config", default=default, help="mini, 7b or a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key"
    )
    parser.add_argument(
        "--print-config",
        action=_PrintConfig,
        nargs=0,
        default=False,
        help="print the resolved configuration as YAML and exit",
    )


class _PrintConfig(argparse.Action):
    """A flag that makes the parser's required arguments optional."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, *_: Any) -> None:
        namespace.print_config = True
        requirements: list[Any] = [*parser._actions, *parser._mutually_exclusive_groups]
        for requirement in requirements:
            requirement.required = False


def load_config_from(
    arguments: argparse.Namespace, stage: int | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Load the configuration that the command line names; `overrides` follow those of `--set`.

    With `--print-config`, print it and exit with code 0.
    """
    config = load_config(arguments.config, stage, [*arguments.set, *overrides])
    if arguments.print_config:
        print(format_config(config), end="")
        sys.exit(0)
    return config


def _find(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIG_DIR / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in CONFIG_DIR.glob("*.yaml"))
        shipped = [stem for stem in known if stem != "base" and not stem.startswith("stage_")]
        raise UserError(f"no config {name!r}: give one of {', '.join(shipped)} or a YAML file")
    return path


def _read_yaml(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    content = _parse_yaml(text, f"{path} is not YAML") or {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys: expected `section:` lines")
    return str(path), content


def _parse_yaml(text: str, fault: str) -> Any:
    """Parse YAML.

    Raises:
        UserError: it is not YAML, a number is huge, or aliases contain themselves or unfold to
            thousands of values; begins with `fault`.
    """
    try:
        content = yaml.safe_load(text)
    except _YAML_ERRORS as error:
        cause = str(error) or type(error).__name__
        raise UserError(f"{fault}: {shorten(cause)}") from error
    values = [content]
    for count, value in enumerate(values):  # grows meanwhile
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise UserError(f"{fault}: a number of {value.bit_length()} bits")
        if count > _MAX_VALUES:
            raise UserError(f"{fault}: more than {_MAX_VALUES} values, or one that contains itself")
        if isinstance(value, dict | list | set | tuple):
            values += [*value, *(value.values() if isinstance(value, dict) else ())]
    return content


def _parse_override(override: str) -> tuple[str, dict[str, Any]]:
    key, equals, value = override.partition("=")
    source = f"--set {shorten(override)}"
    if not equals or not key:
        raise UserError(f"{source}: write it as section.key=value")
    if key.count(".") >= _MAX_LEVELS:
        raise UserError(f"{source}: no key has as many sections")
    nested = _parse_yaml(value, f"{source}: the value is not YAML")
    for name in reversed(key.split(".")):
        nested = {name: nested}
    return source, nested


def _merge(into: dict, layer: dict, source: str, origins: dict[str, str], prefix: str = "") -> None:
    """Merge `layer` into `into` recursively; record the source of each key in `origins`."""
    for key, value in layer.items():
        path = f"{prefix}{key}"
        origins[path] = source
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, source, origins, f"{path}.")
        elif isinstance(value, dict):
            into[key] = {}
            _merge(into[key], value, source, origins, f"{path}.")
        else:
            into[key] = value


def _explain(error: ErrorDetails, origins: dict[str, str]) -> str:
    location = [str(item) for item in error["loc"] if item not in DATASET_TAGS]
    key = shorten(".".join(location))
    source = next(
        (origins[path] for n in range(len(location), 0, -1)
         if (path := ".".join(location[:n])) in origins),
        "the configuration",
    )  # fmt: skip
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0)
        return f"{source}: unknown key {key}; did you mean {'.'.join([*location[:-1], *nearest])}?"
    if error["type"] == "missing":
        return f"{source}: key {key} is missing: add it to a YAML file or give --set {key}=VALUE"
    return f"{source}: {key}: {error['msg']} (found {shown(error['input'])})"


def _known_keys(location: list[str]) -> list[str]:
    """Return the keys of the section at `location`; modalities and list indices are skipped."""
    section: type[BaseModel] = Config
    for name in location:
        if field := section.model_fields.get(name):
            section = _section_in(field.annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section in a type such as `dict[str, DecoderConfig]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)
