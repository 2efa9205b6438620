"""The mini system's frozen components: size on disk, and shapes that the configuration expects."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.config.loader import load_config
from nextgpt.decoders.text_encoders import TextEncoder
from nextgpt.mini_world.build_components import (
    COMPONENTS,
    TRAINING_RECORD,
    ComponentBuilder,
    build_components,
)
from nextgpt.mini_world.captions import CAPTION_TEMPLATES
from nextgpt.mini_world.component_training import diffusion, encoder, text_encoders, vae, vocoder
from nextgpt.mini_world.component_training.runner import TrainingPlan
from nextgpt.mini_world.mini_decoders import DECODER_FOLDERS, MINI_DECODERS, build_mini_decoder
from nextgpt.mini_world.mini_tokenizers import (
    build_clip_tokenizer,
    build_roberta_tokenizer,
    tokenizer_captions,
)
from nextgpt.mini_world.objects import sample_object
from nextgpt.mini_world.words import fill_template
from nextgpt.model.imagebind.loading import load_imagebind
from tiny_decoders import TINY

CPU = torch.device("cpu")
TRAINED = [component for component in COMPONENTS if component != "language_model"]


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All components but the language model, as the command builds them."""
    out = tmp_path_factory.mktemp("components")
    builder = ComponentBuilder(out, tmp_path_factory.mktemp("work"), seed=0, untrained=True)
    build_components(builder, TRAINED)
    return out


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit all training runs to one step on a few media."""
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
def test_components_are_small_and_share_modules(tmp_path: Path) -> None:
    out = tmp_path / "parts"
    build_components(ComponentBuilder(out, tmp_path / "work", seed=0), TRAINED)
    record = json.loads((out / DECODER_FOLDERS["audio"] / TRAINING_RECORD).read_text())
    assert set(record) == {"clap", "sound_vae", "audio_unet", "vocoder"}
    assert all(line["step"] == 1 for line in record.values())
    assert megabytes_to_ship(out) <= 60

    other = tmp_path / "other"
    build_components(ComponentBuilder(out, other, seed=1, rebuilt=["video"]), TRAINED)
    assert [path.stem for path in other.glob("*.jsonl")] == ["video_unet"]
    video, image = (out / DECODER_FOLDERS[modality] for modality in ("video", "image"))
    for inner in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert (video / inner).read_bytes() == (image / inner).read_bytes()


def megabytes_to_ship(*folders: Path) -> float:
    """Total size of all distinct files: identical ones are stored once in a repository."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum({path.read_bytes(): path.stat().st_size for path in files}.values()) / 1e6


@pytest.mark.parametrize("modality", MODALITIES)
def test_caption_embeddings_have_the_configured_shape(modality: Modality, components: Path) -> None:
    expected = load_config("mini").decoders[modality].prompt_embeds_shape
    assert (
        list(TextEncoder(modality, str(components / DECODER_FOLDERS[modality]), CPU).shape)
        == expected
    )


def test_encoder_features_have_the_configured_width(components: Path) -> None:
    encoder = load_imagebind(components / "imagebind_ckpt" / "mini")
    assert encoder.config.output_dim == load_config("mini").encoder.width


@pytest.mark.parametrize("make", [build_clip_tokenizer, build_roberta_tokenizer])
def test_tokenizer_fits_all_captions_and_has_one_token_per_training_word(make: type) -> None:
    captions = tokenizer_captions()
    tokenizer = make(captions, MINI_DECODERS.text_tokens)
    rng = np.random.default_rng(1)
    modalities = ("audio",) if make is build_roberta_tokenizer else ("image", "video", "audio")
    unseen = [  # whose own words fall into letters
        fill_template(template, rng, sample_object(rng))
        for modality in modalities
        for template in CAPTION_TEMPLATES[modality].validation + CAPTION_TEMPLATES[modality].test
        for _ in range(200)
    ]
    longest = max(len(ids) for ids in tokenizer(captions + unseen)["input_ids"])
    assert longest <= MINI_DECODERS.text_tokens
    words = sorted({word for caption in captions for word in caption.replace(",", "").split()})
    split = [w for w in words if len(tokenizer.tokenize(w)) > 1 and "-" not in w]
    assert not split


def test_component_build_failure_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        build_mini_decoder("image", tmp_path / "x", 0, [None], TINY)  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_language_model_answers_and_has_its_special_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "language_model"
    ComponentBuilder(tmp_path, tmp_path, seed=0).write("language_model", folder)
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
