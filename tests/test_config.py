"""The configuration: every shipped YAML is whole, and what is wrong is named with the right key."""

from pathlib import Path

import pytest

from nextgpt.common.errors import UserError
from nextgpt.config.loader import CONFIG_DIR, STAGES, load_config, project_path
from nextgpt.dataset.catalog import CATALOG

SHIPPED = sorted(
    path.stem
    for path in CONFIG_DIR.glob("*.yaml")
    if path.stem != "base" and not path.stem.startswith("stage_")
)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("stage", [None, *STAGES])
def test_every_shipped_yaml_passes_the_schema(name: str, stage: int | None) -> None:
    config = load_config(name, stage)
    if stage is not None:
        assert config.training.trains and config.data.datasets
        assert set(config.data.datasets) <= CATALOG.keys()
        assert project_path(config.training.deepspeed).is_file()


def test_the_published_figures_are_the_default_of_7b() -> None:
    config = load_config("7b", 3)
    assert config.training.betas == (0.9, 0.95) and config.training.weight_decay == 1e-3
    assert config.training.alignment_weights == {"image": 1, "video": 2, "audio": 1}
    assert config.data.batching == "one_dataset_in_turn" and config.data.max_length == 512
    assert [d.signal_tokens for d in config.decoders.values()] == [4, 24, 8]
    assert config.language_model.template == "published"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_config_of_7b_trains_and_samples_as_published(name: str) -> None:
    config = load_config(name, 3)
    published = config.name == load_config("7b").name
    assert config.training.warmup_type == ("log" if published else "linear")
    assert config.generation.top_k == 50


def test_layers_lie_over_each_other_in_order(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("training: {epochs: 3, seed: 1}\nstage_2: {training: {seed: 2}}\n")
    assert load_config(str(own), 1).training.seed == 1
    assert load_config(str(own), 2).training.seed == 2
    assert load_config(str(own), 2).training.epochs == 3
    assert load_config(str(own), 2, ["training.seed=5"]).training.seed == 5
    assert load_config(str(own), 2).training.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.learning_rat=1", "did you mean training.learning_rate?"),
        ("decoders.image.stps=3", "did you mean decoders.image.steps?"),
        ("trainng.epochs=1", "did you mean training?"),
        ("training.epochs=many", "valid integer"),
        ("training.epochs=0", "greater than 0"),
        ("training.trains=[lroa]", "'lora'"),
        ("training.precision=fp8", "'bf16'"),
        ("decoders.picture.steps=3", "'image', 'video' or 'audio'"),
        ("training.epochs", "write it as section.key=value"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_right(override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_config("mini", 1, [override])
    assert f"--set {override}" in str(error.value) and said in str(error.value)


def test_a_wrong_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("stage_1:\n  training: {max_step: 3}\n")
    with pytest.raises(UserError) as error:
        load_config(str(own), 1)
    assert str(own) in str(error.value)
    assert "did you mean training.max_steps?" in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"), [("training: [", "is not YAML"), ("- a\n", "holds no keys")]
)
def test_a_file_that_is_no_configuration_is_refused(
    tmp_path: Path, content: str, said: str
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(content)
    with pytest.raises(UserError, match=said):
        load_config(str(own))


def test_an_unknown_config_name_lists_the_shipped_ones() -> None:
    with pytest.raises(UserError, match=r"give one of 7b, .*7b_24gb, .*mini or a YAML file"):
        load_config("maxi")
