"""Validation: held-out samples never train, losses do not depend on how a run is carried out."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES
from nextgpt.dataset.conversations import open_conversations
from nextgpt.dataset.held_out import RemainingRows, draw_held_out
from test_training import copied_data, media, zero
from tiny_components import write_tiny_delta
from tiny_run import TinyRun, same, tiny_world, trained
from tiny_system import tiny_config, tiny_encoder

SHARE = ["data.validation.share=0.2"]
VALIDATED = [*SHARE, "training.validate_steps=3"]
SETS = ["training.max_steps=8", "training.save_steps=2", "language_model.lora_dropout=0.1"]


def run_of(path: Path, stage: int = 3, *sets: str, **options: object) -> TinyRun:
    flags = ["--init-from", str(trained(stage - 1).folder)] if stage > 1 else []
    return TinyRun(path, stage, [*SETS, *sets], flags, **options)


def validations(run: TinyRun) -> list[dict]:
    """The held-out metrics of each validated step."""
    return [
        {k: v for k, v in row.items() if k == "step" or k.startswith("validation_")}
        for row in run.metrics
        if "validation_loss" in row
    ]


def training_rows(run: TinyRun) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not k.startswith("validation_")} for row in run.metrics
    ]


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run of stage 3 with dropout, validated after steps 3, 6 and 8, that keeps the best."""
    path = tmp_path_factory.mktemp("validated")
    return run_of(path, 3, *VALIDATED, "training.save_best=true").finish()


def assert_equal_validations(run: TinyRun, expected: TinyRun, rel: float) -> None:
    found = validations(run)
    assert len(found) == len(validations(expected)) > 0
    for row, other in zip(found, validations(expected), strict=True):
        assert row == pytest.approx(other, rel=rel)


# ---------------------------------------------------------------- held-out rows


def test_held_out_rows_are_those_that_remaining_rows_leave_out() -> None:
    held_out = np.array([0, 3, 4, 9])
    remaining = RemainingRows(10, held_out)
    assert list(remaining) == [1, 2, 5, 6, 7, 8] and len(remaining) == 6


def test_held_out_rows_are_the_same_in_both_directions_of_pairs() -> None:
    names = ["mini_image_enc", "mini_image_dec", "mini_audio_enc"]
    data = tiny_config(1, [f"data.data_dir={tiny_world() / 'data'}", f"data.datasets={names}"]).data
    dataset = open_conversations(data)
    drawn = draw_held_out(dataset, 0.3, seed=1)
    assert drawn["mini_image_enc"].tolist() == drawn["mini_image_dec"].tolist()
    size = dataset.sizes["mini_image_enc"]
    assert len(drawn["mini_image_enc"]) == round(0.3 * size)
    assert draw_held_out(dataset, 0.3, seed=2)["mini_image_enc"].tolist() != (
        drawn["mini_image_enc"].tolist()
    )
    with pytest.raises(UserError, match="leaves none to train"):
        draw_held_out(dataset, 0.99, seed=1)


def train_recorded(*given: object) -> None:
    """Train, and write the (data set, row) of every sample that is loaded to `rows.txt`."""
    import tiny_run
    from nextgpt.training.data import ExampleDataset
    from nextgpt.training.validation import Validator

    load, init = ExampleDataset.load, Validator.__init__
    folder = Path(given[2]).parent

    def recorded_load(self: ExampleDataset, name: str, row: int) -> object:
        with (folder / "rows.txt").open("a") as file:
            file.write(f"{name} {row}\n")
        return load(self, name, row)

    def recorded_init(self: Validator, *arguments: object) -> None:
        init(self, *arguments)
        lines = (f"{name} {row}\n" for name, row in self.samples)
        (folder / "held_out.txt").write_text("".join(lines))

    ExampleDataset.load, Validator.__init__ = recorded_load, recorded_init
    tiny_run._train(*given)


def test_held_out_rows_never_train_not_even_as_replacements(tmp_path: Path) -> None:
    data = copied_data(tmp_path)
    for file in media(data, "image")[::3]:
        file.unlink()  # the next usable row replaces those
    sets = [f"data.data_dir={data}", "data.datasets=[mini_image_enc]", "data.validation.share=0.4"]
    sets += ["training.epochs=2", "training.max_steps=100", "input_projection.init=least_squares"]
    run = TinyRun(tmp_path / "run", 1, [*sets, "training.validate_steps=100"])
    assert run.start(train_recorded).wait() == 0, run.output
    loaded = (run.save_path / "rows.txt").read_text().split("\n")[:-1]
    held_out = (run.save_path / "held_out.txt").read_text().split("\n")[:-1]
    assert 0 < len(held_out) < len(set(loaded))
    assert loaded[-len(held_out) :] != loaded[: len(held_out)]
    # Only the validation at the end loads them, each once.
    assert sorted(row for row in loaded if row in held_out) == sorted(held_out)
    assert set(loaded[: -len(held_out)]).isdisjoint(held_out)


# ---------------------------------------------------------------- losses


def test_validation_is_logged_at_its_steps_and_at_the_end(validated: TinyRun) -> None:
    rows = validations(validated)
    assert [row["step"] for row in rows] == [3, 6, 8]
    for row in rows:
        assert row["validation_perplexity"] == pytest.approx(np.exp(row["validation_text_loss"]))
        assert row["validation_samples"] > 0 and row["validation_skipped"] == 0
        for modality in ("image", "video", "audio"):
            assert row[f"validation_alignment_{modality}"] > 0
    assert rows[0]["validation_loss"] > rows[-1]["validation_loss"]
    assert "validation=" in validated.output  # the progress bar
    board = EventAccumulator(str(validated.folder / "log"), size_guidance={"scalars": 0}).Reload()
    shown = [(event.step, event.value) for event in board.Scalars("validation_loss")]
    assert shown == [(r["step"], pytest.approx(r["validation_loss"])) for r in rows]


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A validated run whose training does not depend on the number of processes either."""
    path = tmp_path_factory.mktemp("without_dropout")
    return run_of(path, 3, *VALIDATED, "language_model.lora_dropout=0.0").finish()


@pytest.mark.parametrize(("world", "stage"), [(1, 3), (2, 1), (2, 2), (2, 3)])
def test_validation_losses_of_a_run_do_not_depend_on_processes(
    tmp_path: Path, without_dropout: TinyRun, world: int, stage: int
) -> None:
    sets = [*VALIDATED, "language_model.lora_dropout=0.0", zero(stage, tmp_path)]
    run = run_of(tmp_path, 3, *sets, world=world).finish()
    assert_equal_validations(run, without_dropout, rel=1e-4)


@pytest.mark.parametrize(("stage", "rel"), [(1, 1e-12), (3, 1e-6)])  # other memory alignment
def test_validation_of_the_same_parameters_is_equal_on_two_processes(
    tmp_path: Path, stage: int, rel: float
) -> None:
    """Without an update, since the learning rate is next to nothing; 11 micro batches."""
    sets = [*VALIDATED, "training.learning_rate=1.0e-30", "data.validation.max_samples=21"]
    sets += ["training.max_steps=1", "training.micro_batch_size=2", zero(stage, tmp_path)]
    alone = run_of(tmp_path / "alone", 3, *sets).finish()
    both = run_of(tmp_path / "both", 3, *sets, world=2).finish()
    assert_equal_validations(both, alone, rel)
    (row,) = validations(both)
    assert row["validation_samples"] == 21


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["data.packed_seq_length=300"],
        ["training.activation_checkpointing=true"],
        ["data.num_workers=2"],
        ["data.caption_embeddings=online"],
        ["ZERO_3"],
    ],
    ids=lambda sets: sets[0] if sets else "plain",
)
def test_validation_leaves_training_bit_exact(tmp_path: Path, sets: list[str]) -> None:
    if sets == ["ZERO_3"]:
        sets = [zero(3, tmp_path)]
    without = run_of(tmp_path / "without", 3, *SHARE, *sets).finish()
    run = run_of(tmp_path / "with", 3, *VALIDATED, *sets).finish()
    assert len(validations(run)) == 3
    assert training_rows(run) == without.metrics
    assert same(run.delta, without.delta)


def test_validation_with_packed_rows_keeps_losses(tmp_path: Path) -> None:
    sets = [*VALIDATED, "training.learning_rate=1.0e-30", "training.max_steps=1"]
    single = run_of(tmp_path / "single", 3, *sets).finish()
    packed = run_of(tmp_path / "packed", 3, *sets, "data.packed_seq_length=300").finish()
    assert_equal_validations(packed, single, rel=1e-4)


def test_validation_beside_the_hidden_state_cache_keeps_training_bit_exact(tmp_path: Path) -> None:
    cached = ["training.trainable=[output_projections]", "training.cache_hidden_states=true"]
    cached += ["training.epochs=9", "training.max_steps=12", "data.validation.share=0.2"]
    without = run_of(tmp_path / "without", 2, *cached).finish()
    run = run_of(tmp_path / "with", 2, *cached, "training.validate_steps=3").finish()
    assert training_rows(run) == without.metrics and same(run.delta, without.delta)
    computed = run_of(
        tmp_path / "computed", 2, *cached, "training.cache_hidden_states=false",
        "training.validate_steps=3",
    ).finish()  # fmt: skip
    for row, other in zip(validations(run), validations(computed), strict=True):
        assert row["validation_text_loss"] is None and row["validation_perplexity"] is None
        for modality in ("image", "video", "audio"):
            name = f"validation_alignment_{modality}"
            assert row[name] == pytest.approx(other[name], rel=1e-4)


def test_validation_sets_by_name_leave_all_rows_to_train(tmp_path: Path) -> None:
    sets = ["data.datasets=[mini_request,mini_mosit]", "training.max_steps=2"]
    without = run_of(tmp_path / "without", 3, *sets).finish()
    named = ["data.validation.datasets=[mini_text]", "training.validate_steps=1"]
    run = run_of(tmp_path / "with", 3, *sets, *named).finish()
    assert training_rows(run) == without.metrics
    (first, _) = validations(run)
    assert not [name for name in first if "alignment" in name]  # plain text


def test_unusable_held_out_samples_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    data = copied_data(tmp_path)
    for file in media(data, "image"):
        file.unlink()
    sets = [f"data.data_dir={data}", f"data.cache_dir={tmp_path / 'cache'}"]
    sets += ["data.datasets=[mini_audio_enc]", "training.validate_steps=1", "training.max_steps=1"]
    sets += ["training.global_batch_size=4"]
    half = ["data.validation.datasets=[mini_audio_enc,mini_image_enc]"]
    runs = [
        run_of(tmp_path / str(world), 1, *sets, *half, world=world).finish() for world in (1, 2)
    ]
    assert_equal_validations(runs[1], runs[0], rel=1e-6)
    (row,) = validations(runs[0])
    skipped = [line for line in runs[0].skipped if line.get("held_out")]
    assert row["validation_skipped"] == len(skipped) == len(media(tiny_world() / "data", "image"))
    assert row["validation_samples"] > 0 and runs[0].metrics[-1]["skipped"] == 0
    none = run_of(tmp_path / "none", 1, *sets, "data.validation.datasets=[mini_image_enc]")
    assert "no held-out sample can be used" in none.fail()


# ---------------------------------------------------------------- resume, best parameters


def test_validated_run_resumes_bit_exactly(tmp_path: Path, validated: TinyRun) -> None:
    sets = [*VALIDATED, "training.save_best=true"]
    run = run_of(tmp_path, 3, *sets)
    run.kill_when(lambda: len(run.metrics) >= 7)
    resumed = TinyRun(tmp_path, 3, [*SETS, *sets, "data.num_workers=2"], ["--resume"]).finish()
    assert "resumed after step" in resumed.output
    assert resumed.metrics == validated.metrics and same(resumed.delta, validated.delta)
    best = [load_file(one.folder / "best.safetensors") for one in (resumed, validated)]
    assert same(*best)


def test_best_parameters_are_those_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    """A huge learning rate after a tiny warm-up makes later steps worse."""
    sets = [*SHARE, "training.validate_steps=1", "training.save_best=true"]
    sets += ["training.learning_rate=0.3", "training.warmup_ratio=0.9", "training.save_steps=1"]
    run = run_of(tmp_path, 3, *sets).finish()
    losses = [row["validation_loss"] for row in validations(run)]
    best = losses.index(min(losses)) + 1
    assert best < len(losses), losses
    assert f"lowest validation loss {min(losses):.4f}, after step {best}" in run.output
    stopped = [*SETS, *sets, "training.learning_rate=1.0e-30"]
    again = TinyRun(
        tmp_path / "again", 3, [*stopped, "training.max_steps=1", "training.warmup_ratio=0"],
        ["--init-from", str(run.folder / "best.safetensors")],
    ).finish()  # fmt: skip
    assert validations(again)[0]["validation_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert not list(run.folder.glob("checkpoints"))
    assert (run.folder / "delta.safetensors").is_file()


@pytest.mark.parametrize(
    ("sets", "fault"),
    [
        (["training.validate_steps=1"], "needs data.validation"),
        (["training.save_best=true"], "need training.validate_steps"),
        (["data.validation.share=0.999", "training.validate_steps=1"], "leaves none to train"),
        (["data.validation={}"], "give either share or datasets"),
    ],
)
def test_validation_settings_that_do_not_fit_are_refused(
    tmp_path: Path, sets: list[str], fault: str
) -> None:
    assert fault in TinyRun(tmp_path, 1, sets).fail()


# ---------------------------------------------------------------- answers to held-out samples

NOWHERE = [f"decoders.{modality}.path=/nowhere" for modality in ("image", "video", "audio")]


@pytest.fixture(scope="module")
def calls_decoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tuned parameters of a model that often calls a decoder."""
    path = tmp_path_factory.mktemp("calls_decoders") / "delta.safetensors"
    signals = tiny_encoder().signals
    first = [signals.span(modality)[0] - signals.first_id for modality in signals.counts]
    write_tiny_delta(path, first)
    return path


@pytest.mark.parametrize(
    ("precision", "world"), [("fp32", 1), pytest.param("bf16", 2, marks=pytest.mark.slow)]
)
def test_validation_samples_are_shown_and_leave_training_bit_exact(
    tmp_path: Path, calls_decoders: Path, precision: str, world: int
) -> None:
    sets = [*SETS, *VALIDATED, f"training.precision={precision}", "generation.max_new_tokens=60"]
    sets += ["generation.top_p=1.0", "training.activation_checkpointing=true"]
    init = ["--init-from", str(calls_decoders)]
    without = TinyRun(tmp_path / "without", 3, [*sets, *NOWHERE], init, world).finish()
    sets.append("training.validation_samples=14")
    run = TinyRun(tmp_path / "with", 3, sets, init, world).finish()
    assert run.metrics == without.metrics and same(run.delta, without.delta)
    board = EventAccumulator(str(run.folder / "log")).Reload()
    tags = board.Tags()
    texts = [tag for tag in tags["tensors"] if tag.endswith("/text_summary")]
    assert texts == [f"sample_{n}/text/text_summary" for n in range(1, 15)]
    for tag in texts:
        assert [event.step for event in board.Tensors(tag)] == [3, 6, 8]
        (shown,) = board.Tensors(tag)[0].tensor_proto.string_val
        assert b"**human**" in shown and b"expected: **assistant**" in shown
    shown = [tag.rpartition("_")[2] for tag in [*tags["images"], *tags["audio"]]]
    assert set(shown) == set(MODALITIES), shown


def test_validation_samples_of_the_first_stage_are_text_without_decoders(tmp_path: Path) -> None:
    sets = [*VALIDATED, *NOWHERE, "training.validation_samples=2", "generation.max_new_tokens=9"]
    run = run_of(tmp_path, 1, *sets).finish()
    tags = EventAccumulator(str(run.folder / "log")).Reload().Tags()
    assert "sample_2/text/text_summary" in tags["tensors"] and not tags["images"] + tags["audio"]


def test_validation_samples_are_refused_under_zero_3(tmp_path: Path) -> None:
    sets = [*VALIDATED, "training.validation_samples=2", zero(3, tmp_path)]
    assert "needs ZeRO stage 0 to 2" in run_of(tmp_path, 3, *sets).fail()
