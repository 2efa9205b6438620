"""Builds the mini world's frozen parts from nothing: trains them, and writes their folders.

    python -m nextgpt.mini_world.build_components [--only PART ...] [--rebuild] [--untrained]

A part that is there and trained is left alone unless --rebuild is given. What a part needs of
another (the decoders the caption towers, the video network the picture network) is taken from that
one's folder, or trained before it. Every training keeps a checkpoint and its log in the work folder
and goes on from there when it is started again; remove them to begin anew. The language model is
not trained but unpacked, in 30 s.
"""

import argparse
import json
import shutil
import time
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet3DConditionModel
from torch import nn
from transformers import (
    AutoTokenizer,
    ClapTextModelWithProjection,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    SpeechT5HifiGan,
)

from nextgpt.common.cli import run_cli
from nextgpt.common.io import rename_durably
from nextgpt.common.json_io import to_json
from nextgpt.common.modality import Modality
from nextgpt.common.paths import project_path
from nextgpt.mini_world.component_training.diffusion import train_unet
from nextgpt.mini_world.component_training.encoder import train_encoder
from nextgpt.mini_world.component_training.runner import last_log_entry
from nextgpt.mini_world.component_training.text_encoders import (
    ClapTower,
    ClipTower,
    train_clap,
    train_clip,
)
from nextgpt.mini_world.component_training.vae import train_vae
from nextgpt.mini_world.component_training.vocoder import train_vocoder
from nextgpt.mini_world.language_model import convert_language_model
from nextgpt.mini_world.mini_decoders import FOLDERS, MINI, build_mini_decoder, clip_text_config
from nextgpt.mini_world.mini_encoder import MINI_IMAGEBIND, TEXT_TOWER, write_mini_encoder
from nextgpt.mini_world.mini_tokenizers import clip_tokenizer, sample_captions
from nextgpt.model.imagebind import ImageBind, load_imagebind

Part = Literal["language_model", "encoder", "image", "video", "audio"]
PARTS: tuple[Part, ...] = get_args(Part)
_PATHS: dict[Part, str] = {
    "language_model": "smollm2_ckpt/135m_instruct",
    "encoder": "imagebind_ckpt/mini",
    **FOLDERS,
}
# Where each component that is trained lies: its part, and the folder in it.
_HOMES: dict[str, tuple[Part, str]] = {
    "clip": ("encoder", TEXT_TOWER),
    "encoder": ("encoder", "."),
    "picture_vae": ("image", "vae"),
    "image_unet": ("image", "unet"),
    "video_unet": ("video", "unet"),
    "clap": ("audio", "text_encoder"),
    "sound_vae": ("audio", "vae"),
    "audio_unet": ("audio", "unet"),
    "vocoder": ("audio", "vocoder"),
}
# What is trained in several runs, each with a log of its own.
_RUNS: dict[str, tuple[str, ...]] = {"encoder": ("encoder", "encoder_sight")}
_ORIGINS = {"_name_or_path", "is_local", "local_files_only"}  # of a component that was loaded
RECORD = "training.json"  # in a part's folder: what of it is trained, how long, the last losses


class Builder:
    """Makes what the parts are of, each component once, when it is first asked for.

    A component that its part's record calls trained is taken from there; others are trained.

    Args:
        out: folder of the parts.
        work: folder of checkpoints, logs and pools.
        seed: of everything.
        rebuilt: parts to train anew although they are there.
        untrained: give random weights to what is not trained: in a second, to look at the format.
    """

    def __init__(
        self,
        out: Path,
        work: Path,
        seed: int,
        *,
        rebuilt: Collection[Part] = (),
        untrained: bool = False,
    ) -> None:
        self.out = out
        self.work = work
        self.seed = seed
        self.rebuilt = rebuilt
        self.untrained = untrained

    @cached_property
    def clip(self) -> ClipTower:
        """The caption tower of the encoder and of the picture and video pipelines."""
        if self._is_trained("clip"):
            folder = self._home("clip")
            tokenizer = CLIPTokenizer.from_pretrained(folder)
            return ClipTower(_frozen(CLIPTextModelWithProjection, folder), tokenizer)
        return train_clip(self.work, self.seed)

    @cached_property
    def encoder(self) -> ImageBind:
        """Of media."""
        if self._is_trained("encoder"):
            return load_imagebind(self._home("encoder")).requires_grad_(False)
        return train_encoder(self.clip, self.work, self.seed)

    @cached_property
    def clap(self) -> ClapTower:
        """The caption tower of the sound pipeline."""
        if self._is_trained("clap"):
            folder = self._home("clap")
            tokenizer = AutoTokenizer.from_pretrained(folder.with_name("tokenizer"))
            return ClapTower(_frozen(ClapTextModelWithProjection, folder), tokenizer)
        return train_clap(self.work, self.seed)

    @cached_property
    def picture_vae(self) -> AutoencoderKL:
        """Of pictures and of frames."""
        if self._is_trained("picture_vae"):
            return _frozen(AutoencoderKL, self._home("picture_vae"))
        return train_vae("picture", self.work, self.seed)

    @cached_property
    def sound_vae(self) -> AutoencoderKL:
        """Of mel spectrograms."""
        if self._is_trained("sound_vae"):
            return _frozen(AutoencoderKL, self._home("sound_vae"))
        return train_vae("sound", self.work, self.seed)

    @cached_property
    def image_unet(self) -> UNet2DConditionModel:
        """Of the picture pipeline; the video pipeline's begins with it."""
        if self._is_trained("image_unet"):
            return _frozen(UNet2DConditionModel, self._home("image_unet"))
        return train_unet("image", self.picture_vae, self.clip, self.work, self.seed)

    @cached_property
    def video_unet(self) -> UNet3DConditionModel:
        """Of the video pipeline."""
        if self._is_trained("video_unet"):
            return _frozen(UNet3DConditionModel, self._home("video_unet"))
        return train_unet(
            "video", self.picture_vae, self.clip, self.work, self.seed, self.image_unet
        )

    @cached_property
    def audio_unet(self) -> UNet2DConditionModel:
        """Of the sound pipeline."""
        if self._is_trained("audio_unet"):
            return _frozen(UNet2DConditionModel, self._home("audio_unet"))
        return train_unet("audio", self.sound_vae, self.clap, self.work, self.seed)

    @cached_property
    def vocoder(self) -> SpeechT5HifiGan:
        """Of the sound pipeline."""
        if self._is_trained("vocoder"):
            return _frozen(SpeechT5HifiGan, self._home("vocoder"))
        return train_vocoder(self.sound_vae, self.work, self.seed)

    def write(self, part: Part, folder: Path) -> None:
        """Train what is missing of `part` and write its folder, whole or not at all."""
        if part == "language_model":
            convert_language_model(folder)
            return
        if part == "encoder":
            self._write_encoder(folder)
        else:
            trained = {} if self.untrained else self._trained(part)
            build_mini_decoder(part, folder, self.seed, sample_captions(), trained=trained)
        _forget_origins(folder)
        (folder / RECORD).write_text(to_json(self._record(part), indent=1) + "\n")

    def is_complete(self, part: Part) -> bool:
        """Whether the folder is there, with all of it trained unless that is not asked for."""
        folder = self.out / _PATHS[part]
        trained = _trained_in(folder)
        return folder.exists() and (self.untrained or all(n in trained for n in _components(part)))

    def _write_encoder(self, folder: Path) -> None:
        if self.untrained:
            torch.manual_seed(self.seed)
            tokenizer = clip_tokenizer(sample_captions(), MINI.text_tokens)
            tower = CLIPTextModelWithProjection(clip_text_config(tokenizer, MINI))
            write_mini_encoder(folder, ImageBind(MINI_IMAGEBIND), tower, tokenizer)
        else:
            write_mini_encoder(folder, self.encoder, self.clip.model, self.clip.tokenizer)

    def _trained(self, modality: Modality) -> dict[str, Any]:
        """Trained parts of one pipeline, by diffusers' names."""
        if modality == "audio":
            return {
                "tokenizer": self.clap.tokenizer,
                "text_encoder": self.clap.model,
                "vae": self.sound_vae,
                "unet": self.audio_unet,
                "vocoder": self.vocoder,
            }
        return {
            "tokenizer": self.clip.tokenizer,
            "text_encoder": self.clip.model.text_model,
            "vae": self.picture_vae,
            "unet": self.image_unet if modality == "image" else self.video_unet,
        }

    def _home(self, name: str) -> Path:
        part, inner = _HOMES[name]
        return self.out / _PATHS[part] / inner

    def _is_trained(self, name: str) -> bool:
        part, _ = _HOMES[name]
        return part not in self.rebuilt and name in _trained_in(self.out / _PATHS[part])

    def _record(self, part: Part) -> dict[str, dict[str, float]]:
        """Run of each component to its log's last line: steps, seconds on one core, losses."""
        if self.untrained:
            return {}
        before = _trained_in(self.out / _PATHS[part])
        return {
            run: before[run] if self._is_trained(name) else last_log_entry(self.work, run)
            for name in _components(part)
            for run in _RUNS.get(name, (name,))
        }


def _frozen(kind: type[nn.Module], folder: Path) -> Any:
    """A component from its folder, in float32."""
    return kind.from_pretrained(folder).float().eval().requires_grad_(False)


def _forget_origins(folder: Path) -> None:
    """Strike out where a component was loaded from, which the libraries write into its files."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and _ORIGINS & content.keys():
            kept = {key: value for key, value in content.items() if key not in _ORIGINS}
            path.write_text(to_json(kept, indent=2) + "\n", encoding="utf-8")


def _components(part: Part) -> list[str]:
    """What of `part` is trained."""
    return [name for name, (home, _) in _HOMES.items() if home == part]


def _trained_in(folder: Path) -> dict[str, dict[str, float]]:
    """A part's record; empty without one."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def build(builder: Builder, parts: Sequence[Part]) -> None:
    """Build what is missing of `parts`, and those to be rebuilt."""
    builder.work.mkdir(parents=True, exist_ok=True)
    for part in parts:
        folder = builder.out / _PATHS[part]
        if part not in builder.rebuilt and builder.is_complete(part):
            print(f"{part}: {folder} is there")
            continue
        start = time.monotonic()
        made = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(made, ignore_errors=True)
        builder.write(part, made)
        shutil.rmtree(folder, ignore_errors=True)
        rename_durably(made, folder)
        print(f"{part}: {folder} built in {time.monotonic() - start:.0f} s")


def main() -> None:
    """Read the arguments and build."""
    parser = argparse.ArgumentParser(description="build the mini world's frozen parts")
    parser.add_argument("--out", type=Path, default=project_path("ckpt/pretrained_ckpt"))
    parser.add_argument("--work", type=Path, default=project_path("ckpt/build"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rebuild", action="store_true", help="also what is there already")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--untrained", action="store_true", help="random weights, at once")
    arguments = parser.parse_args()
    builder = Builder(
        arguments.out,
        arguments.work,
        arguments.seed,
        rebuilt=arguments.only if arguments.rebuild else (),
        untrained=arguments.untrained,
    )
    build(builder, arguments.only)


if __name__ == "__main__":
    run_cli(main)
