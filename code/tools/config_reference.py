"""Write docs/configuration.md, the reference of all configuration keys, from the schema.

python -m nextgpt.tools.config_reference
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from nextgpt.common.cli import run_cli
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json
from nextgpt.common.modality import MODALITIES
from nextgpt.common.paths import PROJECT_ROOT
from nextgpt.config.loader import CONFIG_DIR, STAGES
from nextgpt.config.renamed_keys import RENAMED_KEYS, RENAMED_VALUES
from nextgpt.config.schema import Config

Schema = Mapping[str, Any]  # JSON schema
REFERENCE = PROJECT_ROOT / "docs" / "configuration.md"
_INTRODUCTION = """# Configuration reference

<!-- Written by `python -m nextgpt.tools.config_reference` from code/config/schema.py. -->

`--config` names a YAML file in `code/config/` (`mini`, `7b`, ...) or a path. It is merged over
[base.yaml](../code/config/base.yaml) and, for training, over `stage_N.yaml`; its own sections
`stage_1` to `stage_4` apply to that stage only. `--set section.key=value` overrides one key;
`--print-config` prints the resolved configuration. Unknown keys are errors. Relative paths are
resolved against the project root.

Defaults are those of base.yaml. *stage*: `stage_N.yaml` sets or overrides the key.
"""
_BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def format_reference() -> str:
    """Format the reference as Markdown: a table per section, then the renamed keys."""
    schema = Config.model_json_schema()
    base, stages = _read("base"), [_read(f"stage_{stage}") for stage in STAGES]
    fields = schema["properties"]
    scalars = {key: field for key, field in fields.items() if not _section_of(field)}
    lines = [_INTRODUCTION, "## Top level", "", *_table(scalars, base, stages)]
    for key, field in fields.items():
        if name := _section_of(field):
            section = schema["$defs"][name]
            title = key if "$ref" in field else f"{key}.{'|'.join(MODALITIES)}"
            lines += ["", f"## {title}", "", section["description"], ""]
            staged = [stage.get(key, {}) for stage in stages]
            lines += _table(section["properties"], base[key], staged)
            for name, values in section["properties"].items():
                for entry in _entries_of(values):
                    inner = schema["$defs"][entry]
                    lines += ["", f"### {key}.{name}", "", inner["description"], ""]
                    lines += _table(inner["properties"], {}, [])
    lines += ["", "## Renamed keys", "", "Deprecated names are still read, with a message.", ""]
    lines += ["| deprecated | use |", "| --- | --- |", *_renamed()]
    return "\n".join(lines) + "\n"


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text(encoding="utf-8"))


def _section_of(field: Schema) -> str | None:
    """Return the name of the section type that a top-level key holds; None for other values."""
    values = field.get("additionalProperties") or field
    return values["$ref"].rpartition("/")[2] if "$ref" in values else None


def _entries_of(field: Schema) -> list[str]:
    """Return the names of the section types that a key of a section, or its list, holds."""
    options = field.get("items", {}).get("oneOf") or field.get("anyOf", [])
    return [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]


def _table(fields: Mapping[str, Schema], base: Schema, stages: Sequence[Schema]) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key, field in fields.items():
        default = _default(key, field, base)
        if any(key in stage for stage in stages):
            default = f"{default}, *stage*" if key in base else "*stage*"
        meaning = " ".join(field["description"].split())
        cells = (f"`{key}`", _type(field), default, meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(key: str, field: Schema, base: Schema) -> str:
    """Format the default of a key; of the decoders, one per modality unless all are equal."""
    if not base and "default" not in field:
        return "required"
    if not base or not base.keys() <= set(MODALITIES):
        return _code(base.get(key, field.get("default")))
    values = {m: base[m].get(key, field.get("default")) for m in base}
    if all(value == values["image"] for value in values.values()):
        return _code(values["image"])
    return "; ".join(f"{m}: {_code(value)}" for m, value in values.items() if value is not None)


def _code(value: Any) -> str:
    text = value if isinstance(value, str) and value else to_json(value)
    return f"`{text}`"


def _type(field: Schema) -> str:
    """Format a JSON schema type in words, e.g. `integer (> 0) or null`."""
    if "$ref" in field:
        return "section"
    if options := field.get("oneOf"):  # entries of a list
        return " or ".join("entry" if "$ref" in option else _type(option) for option in options)
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if "prefixItems" in field:
        return f"list of {len(field['prefixItems'])}: {_type(field['prefixItems'][0])}"
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if field["type"] == "object":
        keys = field.get("propertyNames", {}).get("enum", list(MODALITIES))
        name = "modality" if keys == list(MODALITIES) else _type({"enum": keys})
        return f"map from {name} to {_type(field['additionalProperties'])}"
    bounds = [f"{sign} {field[bound]}" for bound, sign in _BOUNDS.items() if bound in field]
    if "multipleOf" in field:
        bounds.append(f"multiple of {field['multipleOf']}")
    return f"{field['type']} ({', '.join(bounds)})" if bounds else field["type"]


def _renamed() -> Iterator[str]:
    """Yield a table row per deprecated key; the decoders' keys once for all modalities."""
    image, *others = (f"decoders.{modality}." for modality in MODALITIES)
    for old in dict.fromkeys([*RENAMED_KEYS, *RENAMED_VALUES]):
        if old.startswith(tuple(others)):
            continue
        new = RENAMED_KEYS.get(old, old)
        values = RENAMED_VALUES.get(old, {})
        pairs = ", ".join(f"{_code(was)} → {_code(now)}" for was, now in values.items())
        names = [f"`{name.replace(image, 'decoders.*.')}`" for name in (old, new)]
        yield f"| {names[0]} | {names[1]}{f': {pairs}' if pairs else ''} |"


def main() -> None:
    """Write the reference."""
    with atomic_write(REFERENCE) as partial:
        partial.write_text(format_reference(), encoding="utf-8")
    print(REFERENCE)


if __name__ == "__main__":
    run_cli(main)
