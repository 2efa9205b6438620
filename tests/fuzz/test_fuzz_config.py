"""Damaged YAML files and values of `--set`: a configuration, or an error that names its source."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz_oracle import examples, outcome
from fuzz_strategies import changed_json, damaged, to_bytes
from nextgpt.config.loader import CONFIG_DIR, STAGES, format_config, load_config
from nextgpt.config.renamed_keys import RENAMED_KEYS

OWN = {
    "training": {"epochs": 3, "trainable": ["lora"], "alignment_loss_weights": {"image": 1.0}},
    "data": {
        "datasets": ["mini_text", {"name": "own", "path": "a.csv", "direction": "instruction"}],
        "validation": {"share": 0.1},
    },
    "decoders": {"image": {"prompt_embeds_shape": [77, 768]}},
    "stage_2": {"training": {"seed": 2}},
}
YAML_VALUES = [
    "", "~", "1", "-1", "1.5", "yes", ".nan", "-.inf", "1e999", "9" * 5000, "0x" + "f" * 5000,
    "1:59:59", "0b", "0o9", "1_", "2001-99-99", "2001-01-01T99:99:99Z", "2001-01-01", "!!binary x",
    "!!timestamp 1", "!!python/object/apply:os.system [ls]", "!!set {a}", "!!float x", "!!int",
    "!!bool x", "&a [*a]", "&a {b: *a}", "&a {decoders: *a}", "*a", "<<: 1", "<<: &a {<<: *a}",
    "[" * 3000, "[" * 400 + "]" * 400, "{a: " * 400 + "1" + "}" * 400, "{[a]: 1}", "? ? a",
    "{1: 2}", "{null: 1}", "{.nan: 1}", "{training: 1}", "\x00", "\ud800",
    '"\\ud800"', '"\\0"', "\u2028",
    "'", '"', "- a\n- b", "a: b", "---\na\n---\nb", "%YAML 9.9\n--- 1", "# a", "|\n a", "@", "`",
    "a" * 20_000, "[lora, lora]", "{image: 1}", "{image: {height: 8}}", "[{name: a, path: b}]",
]  # fmt: skip


def _dotted(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


CURRENT_KEYS = _dotted(load_config("mini", 1).model_dump())
KEYS = sorted({*CURRENT_KEYS, *RENAMED_KEYS, "", ".", "a.b", "a." * 2000, "\x00"})
NAMES = sorted({name for key in KEYS for name in key.split(".")})
override_keys = st.sampled_from(KEYS) | st.text(max_size=10)
override_values = st.sampled_from(YAML_VALUES) | st.text(max_size=20)
yaml_files = st.one_of(
    damaged((CONFIG_DIR / "mini.yaml").read_bytes()),
    changed_json(OWN, NAMES).map(to_bytes),  # YAML takes nearly all JSON
    st.sampled_from(YAML_VALUES).map(lambda text: text.encode(errors="surrogatepass")),
    st.tuples(override_keys, st.sampled_from(YAML_VALUES)).map(
        lambda pair: f"{pair[0]}: {pair[1]}".encode(errors="surrogatepass")
    ),
)


def load_and_reload(name: str, stage: int | None, overrides: list[str], folder: Path) -> None:
    """Load a configuration, which must be equal when it is written and read back."""
    config = load_config(name, stage, overrides)
    copy = folder / "copy.yaml"
    copy.write_text(format_config(config), encoding="utf-8")
    assert load_config(str(copy), stage) == config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


@examples(40)
@given(content=yaml_files, stage=st.sampled_from([None, *STAGES]))
def test_damaged_yaml_is_read_or_refused(folder: Path, content: bytes, stage: int | None) -> None:
    path = folder / "own.yaml"
    path.write_bytes(content)
    outcome("config file", lambda: load_and_reload(str(path), stage, [], folder), path)


@examples(100)
@example("training.epochs", "2001-99-99", "=")  # errors of PyYAML's constructors
@example("training.epochs", "!!bool x", "=")
@example("training.epochs", "[" * 400 + "]" * 400, "=")  # too deep
@example("training.epochs", "0x" + "f" * 5000, "=")  # not written in decimal digits
@example("training.epochs", "&a [*a]", "=")  # contains itself
@example("a." * 2000, "1", "=")
@given(key=override_keys, value=override_values, equals=st.sampled_from(["=", "=", "=", ""]))
def test_wrong_overrides_are_read_or_refused(
    folder: Path, key: str, value: str, equals: str
) -> None:
    override = f"{key}{equals}{value}"
    outcome(
        "config override",
        lambda: load_and_reload("mini", 1, [override], folder),
        f"--set {override[:60]}",
    )
