"""Configuration: shipped YAML files load, and errors name the right key."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nextgpt import train
from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES
from nextgpt.common.paths import PROJECT_ROOT, project_path
from nextgpt.config import renamed_keys
from nextgpt.config.loader import CONFIG_DIR, STAGES, format_config, load_config
from nextgpt.config.schema import Config
from nextgpt.dataset.catalog import CATALOG
from nextgpt.tools.config_reference import REFERENCE, format_reference

SHIPPED = sorted(
    path.stem
    for path in CONFIG_DIR.glob("*.yaml")
    if path.stem != "base" and not path.stem.startswith("stage_")
)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("stage", [None, *STAGES])
def test_shipped_configs_pass_the_schema(name: str, stage: int | None) -> None:
    config = load_config(name, stage)
    if stage is not None:
        assert config.training.trainable and config.data.datasets
        assert set(config.data.datasets) <= CATALOG.keys()
        assert project_path(config.training.deepspeed_config).is_file()


def test_config_7b_has_the_published_defaults() -> None:
    config = load_config("7b", 3)
    assert config.training.betas == (0.9, 0.95) and config.training.weight_decay == 1e-3
    assert config.training.alignment_loss_weights == {"image": 1, "video": 2, "audio": 1}
    assert config.data.batching == "round_robin" and config.data.max_seq_length == 512
    assert [d.signal_tokens for d in config.decoders.values()] == [4, 24, 8]
    assert config.language_model.prompt_format == "vicuna_v0"


@pytest.mark.parametrize("name", SHIPPED)
def test_config_7b_variants_keep_published_training_and_sampling(name: str) -> None:
    config = load_config(name, 3)
    published = config.name == load_config("7b").name
    assert config.training.warmup_type == ("log" if published else "linear")
    assert config.generation.top_k == 50


def test_config_layers_override_in_order(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("training: {epochs: 3, seed: 1}\nstage_2: {training: {seed: 2}}\n")
    assert load_config(str(own), 1).training.seed == 1
    assert load_config(str(own), 2).training.seed == 2
    assert load_config(str(own), 2).training.epochs == 3
    assert load_config(str(own), 2, ["training.seed=5"]).training.seed == 5
    assert load_config(str(own), 2).training.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "did you mean training.learning_rate?"),
        ("decoders.image.num_inference_stps=3", "did you mean decoders.image.num_inference_steps?"),
        ("trainng.epochs=1", "did you mean training?"),
        ("training.epochs=many", "valid integer"),
        ("training.epochs=0", "greater than 0"),
        ("training.trainable=[lroa]", "'lora'"),
        ("training.precision=fp8", "'bf16'"),
        ("decoders.picture.steps=3", "'image', 'video' or 'audio'"),
        ("training.epochs", "write it as section.key=value"),
    ],
)
def test_config_bad_override_names_the_valid_ones(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config("mini", 1, [override])
    assert f"--set {override}" in str(error.value) and message in str(error.value)


def test_config_bad_key_names_the_file(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("stage_1:\n  training: {max_step: 3}\n")
    with pytest.raises(UserError) as error:
        load_config(str(own), 1)
    assert str(own) in str(error.value)
    assert "did you mean training.max_steps?" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"), [("training: [", "is not YAML"), ("- a\n", "holds no keys")]
)
def test_config_invalid_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(str(own))


def test_config_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(UserError, match=r"give one of 7b, .*7b_24gb, .*mini or a YAML file"):
        load_config("maxi")


RENAMED = [
    ("language_model.template=own", "language_model.prompt_format", "tokenizer"),
    ("language_model.template=published", "language_model.prompt_format", "vicuna_v0"),
    ("language_model.attention=eager", "language_model.attn_implementation", "eager"),
    ("language_model.lora_targets=[k_proj]", "language_model.lora_target_modules", ["k_proj"]),
    ("language_model.train_vocabulary=new", "language_model.trainable_embeddings", "new_tokens"),
    ("language_model.train_vocabulary=all", "language_model.trainable_embeddings", "full"),
    ("input_projection.tokens=3", "input_projection.tokens_per_medium", 3),
    ("output_projection.width=64", "output_projection.d_model", 64),
    ("output_projection.feedforward=3", "output_projection.dim_feedforward", 3),
    ("output_projection.centred=true", "output_projection.whiten_inputs", True),
    ("data.root=there", "data.data_dir", "there"),
    ("data.embeddings=there", "data.caption_embedding_dir", "there"),
    ("data.cache=there", "data.cache_dir", "there"),
    ("data.max_length=7", "data.max_seq_length", 7),
    ("data.row_length=7", "data.packed_seq_length", 7),
    ("data.workers=7", "data.num_workers", 7),
    ("data.batching=one_dataset_in_turn", "data.batching", "round_robin"),
    ("training.trains=[lora]", "training.trainable", ["lora"]),
    ("training.learning_rates={lora_B: 0.5}", "training.group_learning_rates", {"lora_B": 0.5}),
    ("training.epsilon=0.5", "training.adam_epsilon", 0.5),
    ("training.warmup=0.5", "training.warmup_ratio", 0.5),
    ("training.gradient_clipping=0.5", "training.max_grad_norm", 0.5),
    ("training.alignment_weights.video=7", "training.alignment_loss_weights.video", 7),
    ("training.fit_input_projection=true", "input_projection.init", "least_squares"),
    ("training.fit_input_projection=false", "input_projection.init", "random"),
    ("training.keep_states=true", "training.cache_hidden_states", True),
    ("training.save_every=7", "training.save_steps", 7),
    ("training.keep_checkpoints=7", "training.save_total_limit", 7),
    ("training.deepspeed=there", "training.deepspeed_config", "there"),
    ("serving.decoder_placement=offloaded", "serving.offload_decoders", True),
    ("serving.decoder_placement=kept", "serving.offload_decoders", False),
    *(
        (f"decoders.{modality}.{old}={value}", f"decoders.{modality}.{new}", value)
        for modality in MODALITIES
        for old, new, value in (
            ("caption_shape", "prompt_embeds_shape", [7]),
            ("steps", "num_inference_steps", 7),
            ("frames", "num_frames", 7),
            ("seconds", "audio_length_in_s", 7),
        )
    ),
]


def value_at(config: Config, path: str) -> object:
    value: Any = config.model_dump()
    for name in path.split("."):
        value = value[name]
    return value


@pytest.mark.parametrize(("old", "new", "value"), RENAMED, ids=[old for old, _, _ in RENAMED])
def test_renamed_keys_load_with_a_notice_of_the_new_key(
    old: str, new: str, value: object, capsys: pytest.CaptureFixture
) -> None:
    assert value_at(load_config("7b", 3, [old]), new) == value
    (line,) = capsys.readouterr().err.splitlines()
    key = old.partition("=")[0].removesuffix(".video")
    assert line.startswith(f"--set {old}: {key} ")
    assert f" is now called {new.removesuffix('.video')}" in line


def test_renamed_keys_load_in_a_stage_section(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("stage_2: {training: {keep_states: true}, data: {workers: 3}}\n")
    assert load_config(str(own), 2).training.cache_hidden_states
    assert load_config(str(own), 2).data.num_workers == 3
    assert not load_config(str(own), 1).training.cache_hidden_states


def test_renamed_key_given_twice_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("data: {workers: 3, num_workers: 4}\n")
    with pytest.raises(UserError, match=r"workers is the earlier name of data\.num_workers"):
        load_config(str(own))


def test_renamed_keys_are_all_covered() -> None:
    covered = {old.partition("=")[0].removesuffix("weights.video") for old, _, _ in RENAMED}
    assert {key.removesuffix("weights") for key in renamed_keys.RENAMED_KEYS} <= covered


def test_print_config_output_loads_as_the_same_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train.py", "--stage", "2", "--set", "training.seed=7", "--print-config"]
    monkeypatch.setattr(sys, "argv", [*words, "--save_path", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert not ended.value.code
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    config = load_config(str(file))
    assert config.training.seed == 7 and config.save_path == str(tmp_path)
    assert config == load_config("mini", 2, ["training.seed=7", f"save_path={tmp_path}"])


def test_config_reference_is_up_to_date() -> None:
    """If it fails, run `python -m nextgpt.tools.config_reference`."""
    assert REFERENCE.read_text(encoding="utf-8") == format_reference()


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("stage", [None, *STAGES])
def test_format_config_round_trips(name: str, stage: int | None, tmp_path: Path) -> None:
    config = load_config(name, stage)
    (tmp_path / "resolved.yaml").write_text(format_config(config), encoding="utf-8")
    assert load_config(str(tmp_path / "resolved.yaml")) == config


ENTRIES = [
    "inference", "demo_app", "evaluate", "evaluate_parts", "check_data", "prepare_checkpoints",
    "convert_delta",
]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_print_config_needs_no_required_arguments(
    entry: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["--config", "7b", "--print-config", "--set", "generation.top_k=7"]
    monkeypatch.setattr(sys, "argv", [f"{entry}.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROJECT_ROOT / "code" / f"{entry}.py"), run_name="__main__")
    assert ended.value.code == 0
    expected = load_config("7b", overrides=["generation.top_k=7"]).model_dump(mode="json")
    assert yaml.safe_load(capsys.readouterr().out) == expected
