"""Invalid input to the entries: a one-line error, exit code 2, no partial output.

Cases that belong to one module alone (records, media, configuration keys) are in its own tests.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from media_files import write_heic, write_non_finite
from nextgpt import inference, process_embeddings
from nextgpt.common.cli import INTERRUPTED, run_cli
from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.mini_world import write_data
from nextgpt.tools import preprocess_dataset
from parity_tools import PARITY
from tiny_components import script_language_model, tiny_overrides, write_tiny_components
from tiny_decoders import tiny_decoder
from tiny_run import TinyRun, tiny_world, trained
from tiny_system import tiny_encoder

PAIRS = [{"image_name": f"{index}.png", "caption": f"a red circle {index}"} for index in range(3)]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Components with a language model that always answers with an image and audio."""
    folder = tmp_path_factory.mktemp("system")
    write_tiny_components(folder)
    signals = tiny_encoder().signals
    script_language_model(folder, [*signals.span("image"), *signals.span("audio"), 333])
    return folder


def error_of(
    main: Callable[[], None], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Run the entry, which must exit with code 2; return its error output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["entry", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_cli(main)
    message = capsys.readouterr().err
    assert ended.value.code == 2, message
    assert "error: " in message and "Traceback" not in message
    return message


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def twice_as_wide(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


CORRUPTED_FOLDERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a language model cut off": (
        "language_model", lambda f: truncate(f / "model.safetensors"), "cannot be loaded"),
    "a language model without weights": (
        "language_model", lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "a language model that lacks a weight": ("language_model", without_a_weight, "up_proj"),
    "a language model of another size": ("language_model", twice_as_wide, "shape (256"),
    "a language model without figures": (
        "language_model", lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "a language model without tokenizer": (
        "language_model", lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "a decoder without vae": (
        "decoders.image", lambda f: shutil.rmtree(f / "vae"), "cannot be loaded"),
    "a decoder cut off": (
        "decoders.image",
        lambda f: truncate(f / "unet" / "diffusion_pytorch_model.safetensors"),
        "cannot be loaded"),
    "a decoder whose text encoder is cut off": (
        "decoders.image",
        lambda f: truncate(f / "text_encoder" / "model.safetensors"), "cannot be"),
    "a decoder of another modality": (
        "decoders.image",
        lambda f: shutil.copytree(tiny_decoder("audio"), f, dirs_exist_ok=True),
        "image takes a StableDiffusionPipeline"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CORRUPTED_FOLDERS)
def test_components_broken_are_named(
    fault: str, system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, corrupt, expected = CORRUPTED_FOLDERS[fault]
    source = tiny_decoder("image") if key == "decoders.image" else system / "scripted"
    shutil.copytree(source, tmp_path / "part")
    corrupt(tmp_path / "part")
    message = answer_refused(system, tmp_path, capsys, "--set", f"{key}.path={tmp_path / 'part'}")
    assert expected in message and str(tmp_path / "part") in message


def answer_refused(
    system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> str:
    overrides = [*tiny_overrides(system), f"language_model.path={system / 'scripted'}"]
    settings = [expected for override in overrides for expected in ("--set", override)]
    line = ["--config", "7b", *settings, "--prompt", "x", "--out", str(tmp_path / "out"), *more]
    message = error_of(inference.main, line, capsys)
    assert not (tmp_path / "out").exists()
    return message


DELTAS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut off": (".safetensors", truncate, "no readable checkpoint"),
    "empty": (".safetensors", lambda f: os.truncate(f, 0), "no readable checkpoint"),
    "of another program": (
        ".safetensors", lambda f: save_file({"a": torch.zeros(1)}, f), "no tuned parameters"),
    "text": (".pt", lambda f: f.write_text("hello"), "no readable checkpoint"),
    "a list": (".pt", lambda f: torch.save([1], f), "holds no tensors by name"),
    "without tensors": (
        ".pt", lambda f: torch.save({"llama_proj.weight": 1}, f), "holds no tensors by name"),
    "without vocabulary": (
        ".pt",
        lambda f: torch.save({"llama_proj.weight": torch.zeros(1)}, f),
        "lacks the vocabulary"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DELTAS)
def test_delta_broken_is_named(
    fault: str, system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix, corrupt, expected = DELTAS[fault]
    delta = tmp_path / f"delta{suffix}"
    shutil.copyfile(system / "tuned" / "stage_3" / "delta.safetensors", delta)
    corrupt(delta)
    message = answer_refused(system, tmp_path, capsys, "--nextgpt_ckpt_path", str(delta))
    assert expected in message and str(delta) in message


ANSWERS = {
    "a folder to show": (["--image", "/"], "neither a folder nor a URL"),
    "an address to show": (["--image", "https://example.com/a.png"], "nor a URL"),
    "a seed beyond": (["--seed", "-1"], "seed -1"),
    "a place that is no folder": (
        ["--out", str(PARITY / "recipe.py" / "x")],
        "not a writable folder",
    ),
    "a sound too short to be made": (["--audio_length_in_s", "1e-4"], "cannot make this audio"),
    "too many steps": (
        ["--num_inference_steps_for_img", "1001"],
        "decoders.image.num_inference_steps",
    ),
    "an image too large": (["--height", "80000"], "decoders.video.height"),
    "an infinite temperature": (["--temperature", "inf"], "finite number"),
}


ODD_MEDIA = {
    "a HEIC picture": (["--image"], write_heic, "convert it to JPEG or PNG"),
    "a HEIC picture as a video": (["--video"], write_heic, "convert it to JPEG or PNG"),
    "a sound with a sample that is no number": (
        ["--audio"], write_non_finite, "its samples are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ODD_MEDIA)
def test_inference_unusable_medium_is_named(
    fault: str, system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option, write, expected = ODD_MEDIA[fault]
    path = write(tmp_path / "odd.wav")
    message = answer_refused(system, tmp_path, capsys, *option, str(path))
    assert expected in message and str(path) in message


@pytest.mark.parametrize("fault", ANSWERS)
def test_inference_bad_request_writes_nothing(
    fault: str, system: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = ANSWERS[fault]
    assert expected in answer_refused(system, tmp_path, capsys, *arguments)


EMBEDDINGS = {
    "no captions of it": (["captions.json", "audio", "out", "audio"], "no captions of audio"),
    "another modality's model": (["captions.json", "image", "out", "video"], "TextToVideoSD"),
    "a folder that is a file": (
        ["captions.json", "image", "captions.json", "image"],
        "captions.json cannot be written",
    ),
    "no batch": (["captions.json", "image", "out", "image", "--batch_size", "0"], "batch_size 0"),
    "no captions file": (["none.json", "image", "out", "image"], "none.json"),
}


@pytest.mark.parametrize("fault", EMBEDDINGS)
def test_process_embeddings_bad_arguments_write_nothing(
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("captions.json").write_text(json.dumps(PAIRS))
    (captions, modality, out, model, *more), expected = EMBEDDINGS[fault]
    line = [captions, modality, out, str(tiny_decoder(model)), *more]
    assert expected in error_of(process_embeddings.main, line, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["captions.json"]


def test_embedding_store_damaged_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "captions.json").write_text(json.dumps(PAIRS))
    (tmp_path / "embeddings.image.json").write_text("[]")
    line = [tmp_path / "captions.json", "image", tmp_path, tiny_decoder("image")]
    assert "is damaged" in error_of(process_embeddings.main, line, capsys)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.betas=[0.9, 1]", "betas.1"),
        ("training.adam_epsilon=-1", "epsilon"),
        ("training.seed=-1", "seed"),
        ("training.group_learning_rates={lora: -1}", "learning_rates.lora"),
        ("output_projection.heads=7", "multiple of heads 7"),
        ("decoders.image.prompt_embeds_shape=[]", "prompt_embeds_shape"),
        ("decoders.audio.guidance_scale=.inf", "guidance_scale"),
    ],
)
def test_config_impossible_value_is_named(override: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_config("7b", 1, [override])


@pytest.mark.parametrize("content", [b"stage_1: 5\n", b"\xff\xfe"])
def test_config_of_another_format_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"own\.yaml"):
        load_config(str(tmp_path / "own.yaml"), 1)


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["training.trainable=[]"], "training.trainable is empty"),
        (["encoder.width=64"], "encoder.width"),
        (["training.deepspeed_config={file}"], "holds no JSON object"),
        (["data.cache_dir={file}"], "list.json"),
        (["save_path={file}"], "list.json"),
    ],
)
def test_training_that_cannot_start_names_the_reason(
    sets: list[str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "list.json").write_text("[]")
    sets = [override.format(file=tmp_path / "list.json") for override in sets]
    assert expected in TinyRun(tmp_path / "run", 1, sets).fail()
    assert not list(tmp_path.rglob("delta*"))


def test_training_missing_caption_embeddings_name_the_command(tmp_path: Path) -> None:
    sets = [f"data.caption_embedding_dir={tmp_path / 'none'}"]
    start = ["--init-from", str(trained(1).folder)]
    assert "run process_embeddings.py" in TinyRun(tmp_path, 2, sets, start).fail()


def test_entries_refuse_bad_input_without_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tiny_world() / "data" / "mini_world" / "T-X_pair_data" / "image" / "image.json"
    kind = ["llava", pairs, tmp_path / "llava.json"]
    assert "usable as llava" in error_of(preprocess_dataset.main, kind, capsys)
    assert "--seed -1" in error_of(write_data.main, ["--out", tmp_path / "w", "--seed=-1"], capsys)
    assert not list(tmp_path.iterdir())


def test_run_cli_reports_errors_and_interrupts_without_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "Is a directory" in error_of(lambda: tmp_path.read_text() and None, [], capsys)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_cli(interrupted)
    assert ended.value.code == INTERRUPTED and "stopped" in capsys.readouterr().err
