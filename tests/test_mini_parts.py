"""The mini world's frozen parts: sizes that ship, shapes that the configuration expects."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.config.loader import load_config
from nextgpt.mini_world.build_components import PARTS, RECORD, Builder, build
from nextgpt.mini_world.captions import CAPTIONS
from nextgpt.mini_world.component_training import diffusion, encoder, text_encoders, vae, vocoder
from nextgpt.mini_world.component_training.runner import TrainingPlan
from nextgpt.mini_world.mini_decoders import FOLDERS, MINI, build_mini_decoder
from nextgpt.mini_world.mini_tokenizers import clip_tokenizer, roberta_tokenizer, sample_captions
from nextgpt.mini_world.objects import sample_object
from nextgpt.mini_world.words import say
from nextgpt.model.imagebind.loading import load_imagebind
from nextgpt.model.text_encoders import TextEncoder
from tiny_decoders import TINY

CPU = torch.device("cpu")
TRAINED = [part for part in PARTS if part != "language_model"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts but the language model, as the command builds them."""
    out = tmp_path_factory.mktemp("parts")
    builder = Builder(out, tmp_path_factory.mktemp("work"), seed=0, untrained=True)
    build(builder, TRAINED)
    return out


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training takes one step on a few media."""
    short = TrainingPlan(steps=1, learning_rate=1e-4, warmup_steps=1)
    for owner, name in [
        (text_encoders, "CLIP_PLAN"),
        (text_encoders, "CLAP_PLAN"),
        (encoder, "PLAN"),
        (encoder, "VISION_PLAN"),
    ]:
        monkeypatch.setattr(owner, name, short)
    monkeypatch.setattr(vocoder, "PLAN", short)
    monkeypatch.setattr(vae, "PLANS", dict.fromkeys(vae.PLANS, short))
    monkeypatch.setattr(vae, "_STATISTICS_BATCHES", 1)
    monkeypatch.setattr(diffusion, "PLANS", dict.fromkeys(diffusion.PLANS, short))
    monkeypatch.setattr(diffusion, "CACHE_SIZES", dict.fromkeys(diffusion.CACHE_SIZES, 8))
    monkeypatch.setattr(diffusion, "BATCH_SIZES", dict.fromkeys(diffusion.BATCH_SIZES, 8))
    monkeypatch.setattr(encoder, "_AUDIO_CLIPS", 40)


@pytest.mark.usefixtures("one_step")
def test_parts_are_small_enough_and_built_from_what_the_others_folders_hold(tmp_path: Path) -> None:
    out = tmp_path / "parts"
    build(Builder(out, tmp_path / "work", seed=0), TRAINED)
    record = json.loads((out / FOLDERS["audio"] / RECORD).read_text())
    assert set(record) == {"clap", "sound_vae", "audio_unet", "vocoder"}
    assert all(line["step"] == 1 for line in record.values())
    assert megabytes_to_ship(out) <= 60

    other = tmp_path / "other"
    build(Builder(out, other, seed=1, rebuilt=["video"]), TRAINED)
    assert [path.stem for path in other.glob("*.jsonl")] == ["video_unet"]
    video, image = (out / FOLDERS[modality] for modality in ("video", "image"))
    for inner in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert (video / inner).read_bytes() == (image / inner).read_bytes()


def megabytes_to_ship(*folders: Path) -> float:
    """Size of all different files below: what two parts share, a repository holds once."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum({path.read_bytes(): path.stat().st_size for path in files}.values()) / 1e6


@pytest.mark.parametrize("modality", MODALITIES)
def test_caption_shapes_are_the_configurations(modality: Modality, parts: Path) -> None:
    expected = load_config("mini").decoders[modality].prompt_embeds_shape
    assert list(TextEncoder(modality, str(parts / FOLDERS[modality]), CPU).shape) == expected


def test_encoder_gives_features_of_the_configurations_width(parts: Path) -> None:
    encoder = load_imagebind(parts / "imagebind_ckpt" / "mini")
    assert encoder.config.output_dim == load_config("mini").encoder.width


@pytest.mark.parametrize("make", [clip_tokenizer, roberta_tokenizer])
def test_captions_of_every_split_fit_and_trained_words_are_whole(make: type) -> None:
    captions = sample_captions()
    tokenizer = make(captions, MINI.text_tokens)
    rng = np.random.default_rng(1)
    modalities = ("audio",) if make is roberta_tokenizer else ("image", "video", "audio")
    unseen = [  # whose own words fall into letters
        say(template, rng, sample_object(rng))
        for modality in modalities
        for template in CAPTIONS[modality].validation + CAPTIONS[modality].test
        for _ in range(200)
    ]
    longest = max(len(ids) for ids in tokenizer(captions + unseen)["input_ids"])
    assert longest <= MINI.text_tokens
    words = sorted({word for caption in captions for word in caption.replace(",", "").split()})
    split = [w for w in words if len(tokenizer.tokenize(w)) > 1 and "-" not in w]
    assert not split


def test_failed_build_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        build_mini_decoder("image", tmp_path / "x", 0, [None], TINY)  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_language_model_talks_and_its_special_tokens_are_right(tmp_path: Path) -> None:
    folder = tmp_path / "language_model"
    Builder(tmp_path, tmp_path, seed=0).write("language_model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"
