"""A run is resumed with the same inputs at any path; differences are named."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES
from nextgpt.config.loader import load_config
from nextgpt.dataset.conversations import open_conversations
from nextgpt.mini_world.mini_decoders import build_mini_decoder
from nextgpt.model.loading import resolve_model_path, tokenizer_files
from nextgpt.tools.embed_captions import embed_captions
from nextgpt.training.run_inputs import RunInputs, compare_inputs, identify_inputs, read_inputs
from test_training import copied_data
from tiny_decoders import CAPTIONS, TINY, tiny_decoder
from tiny_run import TinyRun, same, tiny_world, trained

IMAGES = "mini_world/T-X_pair_data/image/image.json"


class World:
    """Modifiable copies of all inputs of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = copied_data(folder)
        system = tiny_world()
        shutil.copytree(system / "embed", folder / "embed")
        shutil.copytree(system / "imagebind", folder / "imagebind")
        words = TinyRun(folder, 2).arguments
        language_model = dict(
            word.split("=", 1) for flag, word in pairwise(words) if flag == "--set"
        )["language_model.path"]
        shutil.copytree(resolve_model_path(language_model), folder / "language_model")
        self.delta = folder / "stage_1" / "delta.safetensors"
        shutil.copytree(trained(1).folder, folder / "stage_1")
        self.zero = folder / "zero.json"
        self.set_zero(2)

    def set_zero(self, stage: int) -> None:
        settings = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
        self.zero.write_text(json.dumps(settings))

    @property
    def sets(self) -> list[str]:
        """Overrides that name the copies."""
        return [
            f"data.data_dir={self.data}",
            f"data.caption_embedding_dir={self.folder / 'embed'}",
            f"data.cache_dir={self.folder / 'cache'}",
            f"encoder.path={self.folder / 'imagebind'}",
            f"language_model.path={self.folder / 'language_model'}",
            f"training.deepspeed_config={self.zero}",
        ]

    def inputs(self, stage: int = 2, *more: str) -> RunInputs:
        """Return the inputs that a run of the stage would record, after a JSON round trip."""
        words = TinyRun(self.folder, stage, [*self.sets, *more]).arguments
        overrides = [word for flag, word in pairwise(words) if flag == "--set"]
        config = load_config("7b", stage, overrides)
        found = identify_inputs(config, open_conversations(config.data), self.delta)
        return json.loads(json.dumps(found))

    def change_rows(self, change: Callable[[list[dict]], list[dict]]) -> None:
        """Replace the image annotation's rows by `change` of them."""
        file = self.data / IMAGES
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    def change_tensor(self, file: Path) -> None:
        """Change a single number in a weight file."""
        tensors = load_file(file)
        tensors[min(tensors)].view(-1)[-1] += 1e-3
        save_file(tensors, file, {"format": "pt"})

    def embed_again(self, decoder: Path, keep_records: bool = True) -> None:
        """Recompute the image embeddings with `decoder`."""
        embeddings = self.folder / "embed"
        shutil.rmtree(embeddings, ignore_errors=True)
        world = self.data / "mini_world"
        for modality in MODALITIES:
            made_by = str(decoder if modality == "image" else tiny_decoder(modality))
            pairs = world / "T-X_pair_data" / modality / f"{modality}.json"
            embed_captions(pairs, modality, embeddings, made_by, device=torch.device("cpu"))
        if not keep_records:
            forget_records(embeddings)


def forget_records(embeddings: Path) -> None:
    """Delete all records but the arrays, as the published tools leave them."""
    for file in [*embeddings.glob("*.json"), *embeddings.glob("*.jsonl")]:
        file.unlink()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(scope="module")
def other_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder for images with another text encoder."""
    folder = tmp_path_factory.mktemp("decoders") / "other"
    build_mini_decoder("image", folder, 2, CAPTIONS[:1], TINY)
    return folder


def test_run_inputs_moved_content_is_equal(world: World, tmp_path: Path) -> None:
    before = {stage: world.inputs(stage) for stage in (1, 2, 3)}
    (tmp_path / "moved").mkdir()
    for name in ("data", "embed", "imagebind", "language_model", "stage_1", "zero.json"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    world.folder = tmp_path / "moved"
    world.data, world.zero = world.folder / "data", world.folder / "zero.json"
    world.delta = world.folder / "stage_1" / "delta.safetensors"
    for stage, inputs in before.items():
        assert compare_inputs(inputs, world.inputs(stage)) == []


def test_run_inputs_record_what_the_stage_uses_only(world: World) -> None:
    first, second = world.inputs(1), world.inputs(2)
    assert first["frozen"].keys() == {"language model", "media encoder"}
    assert first["caption_embeddings"] == {}
    assert second["frozen"].keys() == {"language model"}
    assert second["caption_embeddings"].keys() == set(MODALITIES)
    assert all(one["arrays"] for one in second["caption_embeddings"].values())
    online = world.inputs(2, "data.caption_embeddings=online")
    texts = {f"text encoder of the {modality} decoder" for modality in MODALITIES}
    assert online["frozen"].keys() == {"language model"} | texts
    shutil.rmtree(world.folder / "imagebind")
    assert world.inputs(2) == second


CHANGES: dict[str, tuple[int, Callable[[World], object], str]] = {
    "predecessor": (
        2,
        lambda w: w.change_tensor(w.delta),
        r"predecessor: .*stage_1/delta\.safetensors, digest \w+ then, .*digest \w+ now",
    ),
    "half of the rows": (
        2,
        lambda w: w.change_rows(lambda rows: rows[: len(rows) // 2]),
        r"mini_image_dec: .*image\.json, 36 rows, digest \w+ then, .*image\.json, 18 rows",
    ),
    "order of the rows": (
        2,
        lambda w: w.change_rows(lambda rows: rows[::-1]),
        r"mini_image_dec: .*36 rows, digest \w+ then, .*36 rows, digest \w+ now",
    ),
    "a caption that is learned": (
        1,
        lambda w: w.change_rows(lambda rows: [rows[0] | {"caption": "another"}, *rows[1:]]),
        r"mini_image_enc: .*36 rows, digest \w+ then, .*36 rows, digest \w+ now",
    ),
    "language model": (
        2,
        lambda w: w.change_tensor(w.folder / "language_model" / "model.safetensors"),
        r"language model: .*digest \w+ then",
    ),
    "tokenizer": (
        2,
        lambda w: (w.folder / "language_model" / "added_tokens.json").write_text("{}"),
        r"language model: .*digest \w+ then",
    ),
    "media encoder": (
        1,
        lambda w: w.change_tensor(w.folder / "imagebind" / "model.safetensors"),
        r"media encoder: .*imagebind, digest \w+ then",
    ),
}


def test_run_inputs_ignore_extra_files_beside_the_language_model(world: World) -> None:
    before = world.inputs()
    for name in ("LICENSE.txt", "notes.json", "README.md"):
        (world.folder / "language_model" / name).write_text("{}")
    assert compare_inputs(before, world.inputs()) == []


def test_run_inputs_tokenizer_files_are_identified_by_name(tmp_path: Path) -> None:
    belong = {"spiece.model", "tokenizer.json", "vocab.txt", "merges.txt", "chat_template.jinja"}
    for name in (*belong, "LICENSE.txt", "notes.json", "model.safetensors", "config.json"):
        (tmp_path / name).touch()
    assert {file.name for file in tokenizer_files(tmp_path)} == belong


@pytest.mark.parametrize("what", CHANGES)
def test_run_inputs_changed_input_alone_is_named(world: World, what: str) -> None:
    stage, corrupt, message = CHANGES[what]
    before = world.inputs(stage)
    corrupt(world)
    (line,) = compare_inputs(before, world.inputs(stage))
    assert re.match(message, line), line


@pytest.mark.parametrize("recorded", [True, False])
def test_run_inputs_embeddings_of_another_decoder_are_named(
    world: World, other_decoder: Path, recorded: bool
) -> None:
    if not recorded:
        forget_records(world.folder / "embed")
    before = world.inputs()
    world.embed_again(other_decoder, keep_records=recorded)
    (line,) = compare_inputs(before, world.inputs())
    assert line.startswith("image caption embeddings in")
    assert str(other_decoder) in line if recorded else "8 looked at 8 are others" in line


def test_run_inputs_recomputed_embeddings_are_equal(world: World) -> None:
    before = world.inputs()
    world.embed_again(tiny_decoder("image"))
    assert compare_inputs(before, world.inputs()) == []
    array = next((world.folder / "embed").glob("*.npy"))
    array.unlink()  # its sample gives way to another, which the run lists itself
    assert compare_inputs(before, world.inputs()) == []


def killed(world: World, *flags: str) -> TinyRun:
    """Start a run of stage 2 and kill it after its second checkpoint."""
    run = TinyRun(
        world.folder, 2, [*world.sets, "training.save_steps=1", "training.max_steps=8"], flags
    )
    run.kill_when(lambda: "step_000002" in run.checkpoints)
    return run


def resumed(world: World, *more: str, flags: tuple[str, ...] = ()) -> TinyRun:
    sets = [*world.sets, "training.save_steps=1", "training.max_steps=8", *more]
    return TinyRun(world.folder, 2, sets, ["--resume", *flags])


def test_resume_requires_the_inputs_of_the_start(
    world: World, tmp_path: Path, other_decoder: Path
) -> None:
    """Refused: stage 1 retrained, rows removed, embeddings recomputed; accepted: a moved folder."""
    run = killed(world)
    assert read_inputs(run.folder / "checkpoints" / "inputs.json") is not None

    before = tmp_path / "before"
    shutil.copytree(tmp_path / "stage_1", before)
    TinyRun(tmp_path, 1, [*world.sets, "training.seed=7"]).finish()
    message = resumed(world).fail()
    assert "predecessor: " in message and "--restart" in message and run.checkpoints
    assert f"{before}" not in message

    original = (world.data / IMAGES).read_text()
    world.change_rows(lambda rows: rows[:18])
    own = ("--init-from", str(before))
    message = resumed(world, flags=own).fail()
    assert "36 rows" in message and "18 rows" in message and "predecessor" not in message
    (world.data / IMAGES).write_text(original)

    (world.folder / "embed").rename(tmp_path / "kept")
    world.embed_again(other_decoder)
    message = resumed(world, f"decoders.image.path={other_decoder}", flags=own).fail()
    assert "image caption embeddings in" in message and str(other_decoder) in message
    shutil.rmtree(tmp_path / "embed")
    (tmp_path / "kept").rename(tmp_path / "embed")

    (tmp_path / "language_model").rename(tmp_path / "moved")  # a path alone is no difference
    moved = f"language_model.path={tmp_path / 'moved'}"
    uninterrupted = TinyRun(
        tmp_path / "whole", 2, [*world.sets, moved, "training.max_steps=8"], own
    ).finish()
    again = resumed(world, moved, flags=own).finish()
    assert "resumed after step" in again.output
    assert same(again.delta, uninterrupted.delta)
    inputs = read_inputs(again.folder / "inputs.json")
    assert compare_inputs(inputs, read_inputs(uninterrupted.folder / "inputs.json")) == []
    assert not again.checkpoints


def test_resume_of_an_older_version_warns(world: World, tmp_path: Path) -> None:
    run = killed(world)
    record = run.folder / "checkpoints" / "inputs.json"
    record.unlink()
    moved = f"encoder.path={tiny_world() / 'imagebind'}"
    assert "encoder.path" in resumed(world, moved).fail()  # nothing says it is the same
    other = ("--init-from", str(trained(1).folder))
    assert "is of a run that started from" in resumed(world, flags=other).fail()
    again = resumed(world).finish()
    assert f"warning: {record} is missing" in again.output
    assert read_inputs(again.folder / "inputs.json") is not None


def test_run_inputs_are_the_same_for_concurrent_processes(world: World) -> None:
    two = TinyRun(world.folder, 2, world.sets, world=2).finish()
    assert compare_inputs(read_inputs(two.folder / "inputs.json"), world.inputs()) == []
    cache = world.folder / "cache"
    assert not [path for path in cache.rglob("*") if ".partial." in path.name]
    assert len(list(cache.glob("*.arrow"))) == len(MODALITIES)


def test_run_inputs_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_text("{")
    with pytest.raises(UserError, match=r"inputs\.json is damaged: give --restart"):
        read_inputs(tmp_path / "inputs.json")
