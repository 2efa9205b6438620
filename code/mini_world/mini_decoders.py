"""The mini Stable Diffusion, ZeroScope and AudioLDM: their parts, and folders of them.

The same diffusers pipelines as the real ones in the same folder format. `MiniFigures` holds every
size; `part_training` trains them.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from transformers import (
    ClapTextConfig,
    ClapTextModelWithProjection,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from nextgpt.common.io import atomic_write
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.mini_world.mini_tokenizers import clip_tokenizer, roberta_tokenizer

FOLDERS: dict[Modality, str] = {
    "image": "mini_stable_diffusion",
    "video": "mini_zeroscope",
    "audio": "mini_audioldm",
}


@dataclass(frozen=True)
class MiniFigures:
    """Sizes of the three pipelines. Channels are given per resolution, from fine to coarse."""

    # Text encoders: CLIP for image and video, CLAP for sound.
    text_width: int = 192
    text_layers: int = 3
    text_heads: int = 6
    text_feedforward: int = 512
    text_tokens: int = 24  # a caption is padded and cut to so many
    sound_width: int = 256  # of CLAP's projection: the embedding of a sound's caption

    groups: int = 16  # of the denoising networks' group norms; divides all their channels
    head_width: int = 32  # of the networks' attention heads
    latents: int = 12  # channels
    vae: tuple[int, ...] = (24, 48, 64, 64)  # 8 x 8 latents of a frame or a sound
    vae_groups: int = 4  # of its group norms; one channel a group would lose what is bright or red

    size: int = 64  # pixels, both sides, image and video
    picture_unet: tuple[int, ...] = (80, 128)  # of image and video

    sample_rate: int = 16000  # samples per second
    # Product: samples per mel frame, 31 ms. What a vocoder makes of a steady tone repeats with the
    # frames, so that it plays multiples of 32 Hz: shorter frames would put tones further off.
    upsampling: tuple[int, ...] = (1, 1, 500)
    sound_frames: int = 64  # mel frames: 2 s
    mel_bins: int = 64
    audio_unet: tuple[int, ...] = (64, 128)
    vocoder_channels: int = 256  # halved after each upsampling

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return prod(self.upsampling)


MINI = MiniFigures()
# Of a video's first noise, what all frames have in common: from it each frame begins as the same
# picture, and only the motion is left to be learned (the mixed noise of arXiv 2305.10474).
SHARED_NOISE = 0.95
# Stable Diffusion's pipeline without a check of what it makes.
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def build_mini_decoder(
    modality: Modality,
    folder: Path,
    seed: int,
    captions: Sequence[str],
    figures: MiniFigures = MINI,
    trained: Mapping[str, Any] | None = None,
) -> None:
    """Write one pipeline to `folder` (diffusers format, float16), whole or not at all.

    Args:
        seed: of the untrained weights; the global random state is left alone.
        captions: the tokenizer knows their words whole.
        trained: parts by diffusers' names that take the place of untrained ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Copies: the pipeline turns its parts to half precision where they lie.
        parts = _PARTS[modality](figures, captions) | deepcopy(dict(trained or {}))
        pipeline_class = MODALITIES[modality].decoder_class.pipeline_class()
        pipeline: DiffusionPipeline = pipeline_class(scheduler=scheduler(), **parts)
    with atomic_write(folder) as aside:
        pipeline.to(dtype=torch.float16).save_pretrained(aside, safe_serialization=True)


def scheduler() -> DDIMScheduler:
    """DDIM (arXiv 2010.02502) on Stable Diffusion's betas, fit for 20 steps and flat grounds.

    It predicts v, and its noise ends at zero signal (arXiv 2305.08891): mean brightness is kept.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def _picture_parts(f: MiniFigures, captions: Sequence[str]) -> dict[str, Any]:
    tokenizer = clip_tokenizer(captions, f.text_tokens)
    return {
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(clip_text_config(tokenizer, f)),
        "vae": vae(3, f.size, f),
    }


def _image_parts(f: MiniFigures, captions: Sequence[str]) -> dict[str, Any]:
    return {**_picture_parts(f, captions), "unet": unet("image", f), **UNCHECKED}


def _video_parts(f: MiniFigures, captions: Sequence[str]) -> dict[str, Any]:
    return {**_picture_parts(f, captions), "unet": unet("video", f)}


def _audio_parts(f: MiniFigures, captions: Sequence[str]) -> dict[str, Any]:
    tokenizer = roberta_tokenizer(captions, f.text_tokens)
    return {
        "tokenizer": tokenizer,
        "text_encoder": clap_text_model(tokenizer, f),
        "vae": vae(1, f.sound_frames, f),
        "unet": unet("audio", f),
        "vocoder": vocoder(f),
    }


_PARTS: dict[Modality, Callable[[MiniFigures, Sequence[str]], dict[str, Any]]] = {
    "image": _image_parts,
    "video": _video_parts,
    "audio": _audio_parts,
}


def clip_text_config(tokenizer: CLIPTokenizer, f: MiniFigures) -> CLIPTextConfig:
    """The projection is the encoder's text tower's; the pipelines have none."""
    return CLIPTextConfig(
        projection_dim=f.sound_width, max_position_embeddings=f.text_tokens, **_text(tokenizer, f)
    )


def clap_text_model(
    tokenizer: PreTrainedTokenizerBase, f: MiniFigures
) -> ClapTextModelWithProjection:
    """Untrained."""
    return ClapTextModelWithProjection(
        ClapTextConfig(
            projection_dim=f.sound_width,
            # AudioLDM's pipeline pads an empty prompt to the embedding's width; RoBERTa skips two.
            max_position_embeddings=f.sound_width + 2,
            **_text(tokenizer, f),
        )
    )


def _text(tokenizer: PreTrainedTokenizerBase, f: MiniFigures) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": f.text_width,
        "num_hidden_layers": f.text_layers,
        "num_attention_heads": f.text_heads,
        "intermediate_size": f.text_feedforward,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def vae(channels: int, size: int, f: MiniFigures) -> AutoencoderKL:
    """Untrained, for `size` pixels or frames."""
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=f.latents,
        block_out_channels=f.vae,
        down_block_types=("DownEncoderBlock2D",) * len(f.vae),
        up_block_types=("UpDecoderBlock2D",) * len(f.vae),
        layers_per_block=1,
        norm_num_groups=f.vae_groups,
        sample_size=size,
        scaling_factor=1.0,  # training folds the latents' mean and deviation into the weights
    )


def unet(modality: Modality, f: MiniFigures) -> UNet2DConditionModel | UNet3DConditionModel:
    """The untrained denoising network: convolutions at the finest resolution, attention below."""
    audio = modality == "audio"
    widths = f.audio_unet if audio else f.picture_unet
    kind, below = "3D" if modality == "video" else "2D", len(widths) - 1
    figures: dict[str, Any] = {
        "sample_size": _latent_size(f.sound_frames if audio else f.size, f),
        "in_channels": f.latents,
        "out_channels": f.latents,
        "block_out_channels": widths,
        "down_block_types": (f"DownBlock{kind}",) + (f"CrossAttnDownBlock{kind}",) * below,
        "up_block_types": (f"CrossAttnUpBlock{kind}",) * below + (f"UpBlock{kind}",),
        "layers_per_block": 1,
        "norm_num_groups": f.groups,
    }
    if modality == "video":
        return UNet3DConditionModel(
            cross_attention_dim=f.text_width, attention_head_dim=f.head_width, **figures
        )
    # diffusers means the number of heads
    figures["attention_head_dim"] = tuple(width // f.head_width for width in widths)
    if modality == "image":
        return UNet2DConditionModel(
            cross_attention_dim=f.text_width, use_linear_projection=True, **figures
        )
    return UNet2DConditionModel(
        # As in AudioLDM the caption comes in with the time; "cross" attention looks at itself.
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=f.sound_width,
        class_embeddings_concat=True,
        cross_attention_dim=widths,
        **figures,
    )


def vocoder(f: MiniFigures) -> SpeechT5HifiGan:
    """Untrained; reads the VAE's spectrograms as they are."""
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=f.mel_bins,
            sampling_rate=f.sample_rate,
            upsample_initial_channel=f.vocoder_channels,
            upsample_rates=f.upsampling,
            # Kernel minus stride is even, so that a frame becomes exactly `hop` samples.
            upsample_kernel_sizes=[2 * rate + rate % 2 for rate in f.upsampling],
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3),),
            normalize_before=False,
        )
    )


def _latent_size(size: int, f: MiniFigures) -> int:
    return size // 2 ** (len(f.vae) - 1)
