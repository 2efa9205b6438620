"""Builds the mini world's frozen parts from nothing: trains them, and writes their folders.

    cd code; python -m mini_world.build_parts [--only PART ...] [--rebuild] [--untrained]

A part that is there is left alone unless --rebuild is given. What a part needs of another (the
decoders the caption towers, the video network the picture network) is trained before it. Every
training keeps a checkpoint and its log in the work folder and goes on from there when it is started
again. The language model is not trained but unpacked, in 30 s.
"""

import argparse
import shutil
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModelWithProjection

from config.entry import run_entry
from config.loader import project_path
from conversation.parts import Modality
from mini_world.language_model import convert_language_model
from mini_world.mini_decoders import FOLDERS, MINI, build_mini_decoder, clip_text_config
from mini_world.mini_encoder import MINI_IMAGEBIND, write_mini_encoder
from mini_world.mini_tokenizers import clip_tokenizer, sample_captions, tokenize
from mini_world.part_training.diffusion import Embed, train_unet
from mini_world.part_training.encoder import train_encoder
from mini_world.part_training.towers import (
    ClapTower,
    ClipTower,
    clap_features,
    train_clap,
    train_clip,
)
from mini_world.part_training.vae import train_vae
from mini_world.part_training.vocoder import train_vocoder
from model.imagebind.encoder import ImageBind

Part = Literal["language_model", "encoder", "image", "video", "audio"]
PARTS: tuple[Part, ...] = get_args(Part)
_PATHS: dict[Part, str] = {
    "language_model": "smollm2_ckpt/135m_instruct",
    "encoder": "imagebind_ckpt/mini",
    **FOLDERS,
}


class Builder:
    """Trains what the parts are made of, each once, when it is first asked for.

    Args:
        work: folder of checkpoints, logs and pools.
        seed: of everything.
        untrained: write the parts with random weights: in a second, to look at the format.
    """

    def __init__(self, work: Path, seed: int, *, untrained: bool = False) -> None:
        self.work = work
        self.seed = seed
        self.untrained = untrained

    @cached_property
    def clip(self) -> ClipTower:
        """The caption tower of the encoder and of the picture and video pipelines."""
        return train_clip(self.work, self.seed)

    @cached_property
    def clap(self) -> ClapTower:
        """The caption tower of the sound pipeline."""
        return train_clap(self.work, self.seed)

    @cached_property
    def picture_vae(self) -> AutoencoderKL:
        """Of pictures and of frames."""
        return train_vae("picture", self.work, self.seed)

    @cached_property
    def sound_vae(self) -> AutoencoderKL:
        """Of mel spectrograms."""
        return train_vae("sound", self.work, self.seed)

    @cached_property
    def picture_unet(self) -> UNet2DConditionModel:
        """Of the picture pipeline; the video pipeline's begins with it."""
        return train_unet("image", self.picture_vae, self._states, self.work, self.seed)

    def write(self, part: Part, folder: Path) -> None:
        """Train what is missing of `part` and write its folder, whole or not at all."""
        if part == "language_model":
            convert_language_model(folder)
        elif part == "encoder" and self.untrained:
            torch.manual_seed(self.seed)
            tokenizer = clip_tokenizer(sample_captions(), MINI.text_tokens)
            tower = CLIPTextModelWithProjection(clip_text_config(tokenizer, MINI))
            write_mini_encoder(folder, ImageBind(MINI_IMAGEBIND), tower, tokenizer)
        elif part == "encoder":
            encoder = train_encoder(self.clip, self.work, self.seed)
            write_mini_encoder(folder, encoder, self.clip.model, self.clip.tokenizer)
        else:
            trained = None if self.untrained else self._trained(part)
            build_mini_decoder(part, folder, self.seed, sample_captions(), trained=trained)

    def _trained(self, modality: Modality) -> dict[str, Any]:
        """Trained parts of one pipeline, by diffusers' names."""
        if modality == "audio":
            return {
                "tokenizer": self.clap.tokenizer,
                "text_encoder": self.clap.model,
                "vae": self.sound_vae,
                "unet": train_unet("audio", self.sound_vae, self._features, self.work, self.seed),
                "vocoder": train_vocoder(self.sound_vae, self.work, self.seed),
            }
        unet = self.picture_unet
        if modality == "video":
            unet = train_unet("video", self.picture_vae, self._states, self.work, self.seed, unet)
        return {
            "tokenizer": self.clip.tokenizer,
            "text_encoder": self.clip.model.text_model,
            "vae": self.picture_vae,
            "unet": unet,
        }

    @property
    def _states(self) -> Embed:
        """Captions to the states (N, 24, 192) that the picture and video networks attend to."""

        def embed(captions: list[str]) -> torch.Tensor:
            tokens = tokenize(self.clip.tokenizer, captions)
            with torch.no_grad():
                return self.clip.model.text_model(tokens.input_ids).last_hidden_state

        return embed

    @property
    def _features(self) -> Embed:
        """Captions to the features (N, 256) that the sound network is told."""

        def embed(captions: list[str]) -> torch.Tensor:
            with torch.no_grad():
                return clap_features(self.clap, captions)

        return embed


def build(builder: Builder, out: Path, parts: Sequence[Part], *, rebuild: bool) -> None:
    """Build `parts` into `out`, those that are there only on `rebuild`."""
    builder.work.mkdir(parents=True, exist_ok=True)
    for part in parts:
        folder = out / _PATHS[part]
        if folder.exists() and not rebuild:
            print(f"{part}: {folder} is there")
            continue
        start = time.monotonic()
        made = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(made, ignore_errors=True)
        builder.write(part, made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
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
    builder = Builder(arguments.work, arguments.seed, untrained=arguments.untrained)
    build(builder, arguments.out, arguments.only, rebuild=arguments.rebuild)


if __name__ == "__main__":
    run_entry(main)
