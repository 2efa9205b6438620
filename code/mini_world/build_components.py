"""Train the mini system's frozen components from scratch and write their folders.

    python -m nextgpt.mini_world.build_components [--only COMPONENT ...] [--rebuild] [--untrained]

A component that is already trained is kept unless --rebuild is given. Modules of other components
that it depends on (text encoders of the decoders, the image UNet of the video UNet) are loaded from
their folders, or trained first. Each training run keeps its checkpoint and log in the work folder
and resumes from there; delete them to start over. The language model is not trained but converted,
in 30 s.
"""

import argparse
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
from nextgpt.common.json_io import read_json, to_json
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
from nextgpt.mini_world.mini_decoders import (
    DECODER_FOLDERS,
    MINI_DECODERS,
    build_mini_decoder,
    clip_text_config,
)
from nextgpt.mini_world.mini_encoder import MINI_IMAGEBIND, TEXT_TOWER, write_mini_encoder
from nextgpt.mini_world.mini_tokenizers import build_clip_tokenizer, tokenizer_captions
from nextgpt.model.imagebind import ImageBind, load_imagebind

Component = Literal["language_model", "encoder", "image", "video", "audio"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
_PATHS: dict[Component, str] = {
    "language_model": "smollm2_ckpt/135m_instruct",
    "encoder": "imagebind_ckpt/mini",
    **DECODER_FOLDERS,
}
# Component and subfolder of each trained module.
_MODULES: dict[str, tuple[Component, str]] = {
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
# Modules trained in several runs, each with its log.
_RUNS: dict[str, tuple[str, ...]] = {"encoder": ("encoder", "encoder_sight")}
# Keys with which libraries record in a module's files where it was loaded from.
_ORIGIN_KEYS = {"_name_or_path", "is_local", "local_files_only"}
# In a component's folder: the last log line (step, seconds, losses) of each of its training runs.
TRAINING_RECORD = "training.json"


class ComponentBuilder:
    """Builds components from modules, each of which is loaded or trained on first use.

    A module listed in its component's training record is loaded from there; others are trained.

    Args:
        out: folder of the components.
        work: folder of checkpoints, logs and caches.
        seed: seed of all training runs.
        rebuilt: components to train again even if they exist.
        untrained: random weights for modules that are not trained yet; takes a second.
    """

    def __init__(
        self,
        out: Path,
        work: Path,
        seed: int,
        *,
        rebuilt: Collection[Component] = (),
        untrained: bool = False,
    ) -> None:
        self.out = out
        self.work = work
        self.seed = seed
        self.rebuilt = rebuilt
        self.untrained = untrained

    @cached_property
    def clip(self) -> ClipTower:
        """Text encoder of the media encoder and of the image and video pipelines."""
        if model := self._load("clip", CLIPTextModelWithProjection):
            return ClipTower(model, CLIPTokenizer.from_pretrained(self._folder("clip")))
        return train_clip(self.work, self.seed)

    @cached_property
    def encoder(self) -> ImageBind:
        """The media encoder."""
        if self._is_trained("encoder"):
            return load_imagebind(self._folder("encoder")).requires_grad_(False)
        return train_encoder(self.clip, self.work, self.seed)

    @cached_property
    def clap(self) -> ClapTower:
        """Text encoder of the audio pipeline."""
        if model := self._load("clap", ClapTextModelWithProjection):
            folder = self._folder("clap").with_name("tokenizer")
            return ClapTower(model, AutoTokenizer.from_pretrained(folder))
        return train_clap(self.work, self.seed)

    @cached_property
    def picture_vae(self) -> AutoencoderKL:
        """VAE of images and frames."""
        trained = self._load("picture_vae", AutoencoderKL)
        return trained or train_vae("picture", self.work, self.seed)

    @cached_property
    def sound_vae(self) -> AutoencoderKL:
        """VAE of mel spectrograms."""
        trained = self._load("sound_vae", AutoencoderKL)
        return trained or train_vae("sound", self.work, self.seed)

    @cached_property
    def image_unet(self) -> UNet2DConditionModel:
        """UNet of the image pipeline, which initialises that of the video pipeline."""
        trained = self._load("image_unet", UNet2DConditionModel)
        return trained or train_unet("image", self.picture_vae, self.clip, self.work, self.seed)

    @cached_property
    def video_unet(self) -> UNet3DConditionModel:
        """UNet of the video pipeline."""
        return self._load("video_unet", UNet3DConditionModel) or train_unet(
            "video", self.picture_vae, self.clip, self.work, self.seed, self.image_unet
        )

    @cached_property
    def audio_unet(self) -> UNet2DConditionModel:
        """UNet of the audio pipeline."""
        trained = self._load("audio_unet", UNet2DConditionModel)
        return trained or train_unet("audio", self.sound_vae, self.clap, self.work, self.seed)

    @cached_property
    def vocoder(self) -> SpeechT5HifiGan:
        """Vocoder of the audio pipeline."""
        trained = self._load("vocoder", SpeechT5HifiGan)
        return trained or train_vocoder(self.sound_vae, self.work, self.seed)

    def write(self, component: Component, folder: Path) -> None:
        """Train the missing modules of `component` and write its folder, atomically."""
        if component == "language_model":
            convert_language_model(folder)
            return
        if component == "encoder":
            self._write_encoder(folder)
        else:
            trained = {} if self.untrained else self._pipeline_modules(component)
            build_mini_decoder(component, folder, self.seed, tokenizer_captions(), trained=trained)
        _remove_origins(folder)
        (folder / TRAINING_RECORD).write_text(to_json(self._record(component), indent=1) + "\n")

    def is_complete(self, component: Component) -> bool:
        """Return whether the folder exists and, unless `untrained`, all modules are trained."""
        folder = self.out / _PATHS[component]
        trained = self.untrained or _read_record(folder).keys() >= set(_modules_of(component))
        return folder.exists() and trained

    def _write_encoder(self, folder: Path) -> None:
        if self.untrained:
            torch.manual_seed(self.seed)
            tokenizer = build_clip_tokenizer(tokenizer_captions(), MINI_DECODERS.text_tokens)
            tower = CLIPTextModelWithProjection(clip_text_config(tokenizer, MINI_DECODERS))
            write_mini_encoder(folder, ImageBind(MINI_IMAGEBIND), tower, tokenizer)
        else:
            write_mini_encoder(folder, self.encoder, self.clip.model, self.clip.tokenizer)

    def _pipeline_modules(self, modality: Modality) -> dict[str, Any]:
        """Trained modules of a pipeline, by diffusers' names."""
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

    def _folder(self, module: str) -> Path:
        component, inner = _MODULES[module]
        return self.out / _PATHS[component] / inner

    def _is_trained(self, module: str) -> bool:
        component, _ = _MODULES[module]
        record = _read_record(self.out / _PATHS[component])
        return component not in self.rebuilt and module in record

    def _load(self, module: str, kind: type[nn.Module]) -> Any:
        """Load a trained module, frozen and in float32; None if it is not trained yet."""
        if not self._is_trained(module):
            return None
        return kind.from_pretrained(self._folder(module)).float().eval().requires_grad_(False)

    def _record(self, component: Component) -> dict[str, dict[str, float]]:
        """The component's training record; empty with random weights."""
        if self.untrained:
            return {}
        before = _read_record(self.out / _PATHS[component])
        return {
            run: before[run] if self._is_trained(module) else last_log_entry(self.work, run)
            for module in _modules_of(component)
            for run in _RUNS.get(module, (module,))
        }


def _remove_origins(folder: Path) -> None:
    """Remove the paths that modules were loaded from out of their configuration files."""
    for path in folder.rglob("*.json"):
        content = read_json(path)
        if isinstance(content, dict) and _ORIGIN_KEYS & content.keys():
            kept = {key: value for key, value in content.items() if key not in _ORIGIN_KEYS}
            path.write_text(to_json(kept, indent=2) + "\n", encoding="utf-8")


def _modules_of(component: Component) -> list[str]:
    """Names of the trained modules of `component`."""
    return [name for name, (owner, _) in _MODULES.items() if owner == component]


def _read_record(folder: Path) -> dict[str, dict[str, float]]:
    """Read a component's training record; empty without one."""
    path = folder / TRAINING_RECORD
    return read_json(path) if path.is_file() else {}


def build_components(builder: ComponentBuilder, components: Sequence[Component]) -> None:
    """Build those of `components` that are incomplete or to be rebuilt."""
    builder.work.mkdir(parents=True, exist_ok=True)
    for component in components:
        folder = builder.out / _PATHS[component]
        if component not in builder.rebuilt and builder.is_complete(component):
            print(f"{component}: {folder} exists")
            continue
        start = time.monotonic()
        temporary = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(temporary, ignore_errors=True)
        builder.write(component, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        rename_durably(temporary, folder)
        print(f"{component}: {folder} built in {time.monotonic() - start:.0f} s")


def main() -> None:
    """Parse the arguments and build."""
    parser = argparse.ArgumentParser(description="build the mini system's frozen components")
    parser.add_argument("--out", type=Path, default=project_path("ckpt/pretrained_ckpt"))
    parser.add_argument("--work", type=Path, default=project_path("ckpt/build"))
    parser.add_argument("--only", nargs="+", choices=COMPONENTS, default=list(COMPONENTS))
    parser.add_argument("--rebuild", action="store_true", help="also those that exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--untrained", action="store_true", help="random weights, without training")
    arguments = parser.parse_args()
    builder = ComponentBuilder(
        arguments.out,
        arguments.work,
        arguments.seed,
        rebuilt=arguments.only if arguments.rebuild else (),
        untrained=arguments.untrained,
    )
    build_components(builder, arguments.only)


if __name__ == "__main__":
    run_cli(main)
