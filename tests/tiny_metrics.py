"""Tiny networks of the metrics with random weights, and data sets of a few media as published."""

import csv
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from PIL import Image
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    BertConfig,
    BertModel,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    RobertaTokenizer,
)

from nextgpt.common.modality import Modality
from nextgpt.media.writing import Frames, Sound
from tiny_decoders import tiny_decoder

_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
CAPTIONS = ["a small red circle", "two big drums", "a blue square on the left", "one green star"]


@cache
def tiny_networks() -> dict[str, str]:
    """Folders of all networks by key of the section `evaluation`; do not modify them."""
    folder = Path(mkdtemp(prefix="tiny_metrics_"))
    torch.manual_seed(0)
    _save_clip(folder / "clip")
    _save_clap(folder / "clap")
    vision = Dinov2Model(Dinov2Config(**_SMALL, mlp_ratio=1, image_size=28, patch_size=14))
    vision.save_pretrained(folder / "inception")
    CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder / "inception")
    ast = ASTConfig(**_SMALL, num_mel_bins=16, max_length=64, num_labels=5)
    ASTForAudioClassification(ast).save_pretrained(folder / "audio_tagger")
    ASTFeatureExtractor(num_mel_bins=16, max_length=64).save_pretrained(folder / "audio_tagger")
    tokenizer = RobertaTokenizer.from_pretrained(tiny_decoder("audio") / "tokenizer")
    BertModel(BertConfig(**_SMALL, vocab_size=len(tokenizer))).save_pretrained(
        folder / "sentence_encoder"
    )
    tokenizer.save_pretrained(folder / "sentence_encoder")
    return {path.name: str(path) for path in folder.iterdir()}


def _save_clip(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(
        tiny_decoder("image") / "tokenizer", model_max_length=77
    )
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=_SMALL | text, vision_config=_SMALL | vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)


def _save_clap(folder: Path) -> None:
    tokenizer = RobertaTokenizer.from_pretrained(tiny_decoder("audio") / "tokenizer")
    audio = {
        "spec_size": 32, "num_mel_bins": 16, "patch_embeds_hidden_size": 16, "depths": [1, 1],
        "num_attention_heads": [2, 2], "hidden_size": 32, "num_hidden_layers": 2, "window_size": 2,
        "patch_size": 4, "patch_stride": [4, 4], "enable_fusion": False, "num_classes": 4,
    }  # fmt: skip
    text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = ClapConfig(text_config=_SMALL | text, audio_config=audio, projection_dim=8)
    ClapModel(config).save_pretrained(folder)
    extractor = ClapFeatureExtractor(
        feature_size=16, sampling_rate=16000, hop_length=320, max_length_s=1,
        fft_window_size=400, frequency_max=8000, truncation="rand_trunc", padding="repeatpad",
    )  # fmt: skip
    ClapProcessor(extractor, tokenizer).save_pretrained(folder)


def write_medium(modality: Modality, file: Path, seed: int) -> Path:
    """Write a medium of noise."""
    file.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    if modality == "image":
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), np.uint8)).save(file)
    elif modality == "video":
        Frames(generator.integers(0, 256, (6, 32, 32, 3), np.uint8), 4).save(file)
    else:
        Sound(generator.uniform(-0.5, 0.5, 8000).astype(np.float32), 16000).save(file)
    return file


def write_coco(folder: Path, captions: Sequence[str] = CAPTIONS) -> Path:
    """COCO with one image of each split of val2014 more than asked for."""
    images = []
    for number, caption in enumerate([*captions, "of another split"]):
        name = f"COCO_val2014_{number:012d}.jpg"
        write_medium("image", folder / "val2014" / name, number)
        sentences = [{"raw": f"{caption} "}, {"raw": f"this is {caption}."}]
        split = "test" if number < len(captions) else "restval"
        images.append(
            {"filepath": "val2014", "filename": name, "split": split, "sentences": sentences}
        )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return folder


def write_msrvtt(folder: Path, captions: Sequence[str] = CAPTIONS) -> Path:
    """MSR-VTT with a training video, whose file is missing."""
    videos = [{"video_id": f"video{n}", "split": "test"} for n in range(len(captions))]
    videos.append({"video_id": "video99", "split": "train"})
    sentences = [{"video_id": f"video{n}", "caption": c} for n, c in enumerate(captions)]
    sentences += [
        {"video_id": "video0", "caption": "again"},
        {"video_id": "video99", "caption": "-"},
    ]
    for number in range(len(captions)):
        write_medium("video", folder / "videos" / f"video{number}.mp4", number)
    content = {"videos": videos, "sentences": sentences}
    (folder / "test_videodatainfo.json").write_text(json.dumps(content))
    return folder


def write_audiocaps(folder: Path, captions: Sequence[str] = CAPTIONS) -> Path:
    """AudioCaps' test split."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audiocap_id", "youtube_id", "start_time", "caption"])
        for number, caption in enumerate(captions):
            write_medium("audio", folder / "audios" / f"id_{number}.wav", number)
            writer.writerows([[number, f"id_{number}", 0, c] for c in (caption, f"so {caption}")])
    return folder
