"""Builds the mini Stable Diffusion, ZeroScope and AudioLDM from nothing, untrained.

The same diffusers pipelines as the real ones in the same folder format, 6 to 8 M parameters each,
in half precision 16 MB or less. `MiniFigures` holds every size.
"""

from collections.abc import Callable, Sequence
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

from config.atomic import written_aside
from conversation.parts import Modality
from mini_world.mini_tokenizers import clip_tokenizer, roberta_tokenizer
from model.decoders import PIPELINES

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

    groups: int = 16  # of every group norm; divides all channels
    head_width: int = 32  # of the networks' attention heads

    size: int = 64  # pixels, both sides, image and video
    image_vae: tuple[int, ...] = (32, 64, 64)  # 16 x 16 latents
    image_latents: int = 4
    image_unet: tuple[int, ...] = (64, 96, 128)

    video_vae: tuple[int, ...] = (32, 48, 64, 64)  # 8 x 8 latents a frame
    video_latents: int = 8
    video_unet: tuple[int, ...] = (64, 96)

    sample_rate: int = 16000  # samples per second
    upsampling: tuple[int, ...] = (5, 5, 5, 2)  # product: samples per mel frame, 15.6 ms
    sound_frames: int = 128  # mel frames: 2 s
    mel_bins: int = 64
    audio_vae: tuple[int, ...] = (32, 48, 64)  # 32 x 16 latents
    audio_latents: int = 8
    audio_unet: tuple[int, ...] = (64, 128)
    vocoder_channels: int = 192  # halved after each upsampling

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return prod(self.upsampling)


MINI = MiniFigures()


def build_mini_decoder(
    modality: Modality,
    folder: Path,
    seed: int,
    captions: Sequence[str],
    figures: MiniFigures = MINI,
) -> None:
    """Write one untrained pipeline to `folder` (diffusers format, float16), whole or not at all.

    Args:
        seed: of the weights; the global random state is left alone.
        captions: the tokenizer knows their words whole.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _PARTS[modality](figures, captions)
        pipeline: DiffusionPipeline = PIPELINES[modality](scheduler=scheduler(), **parts)
    with written_aside(folder) as aside:
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


def _image_parts(f: MiniFigures, captions: Sequence[str]) -> dict[str, Any]:
    tokenizer = clip_tokenizer(captions, f.text_tokens)
    unet = UNet2DConditionModel(
        sample_size=_latent_size(f.size, f.image_vae),
        in_channels=f.image_latents,
        out_channels=f.image_latents,
        cross_attention_dim=f.text_width,
        attention_head_dim=_heads(f.image_unet, f),  # diffusers means the number of heads
        **_unet_blocks(f.image_unet, f, "2D"),
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": _clip(tokenizer, f),
        "vae": _vae(3, f.image_latents, f.image_vae, f.size, f),
        "unet": unet,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _video_parts(f: MiniFigures, captions: Sequence[str]) -> dict[str, Any]:
    tokenizer = clip_tokenizer(captions, f.text_tokens)
    unet = UNet3DConditionModel(
        sample_size=_latent_size(f.size, f.video_vae),
        in_channels=f.video_latents,
        out_channels=f.video_latents,
        cross_attention_dim=f.text_width,
        attention_head_dim=f.head_width,
        **_unet_blocks(f.video_unet, f, "3D"),
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": _clip(tokenizer, f),
        "vae": _vae(3, f.video_latents, f.video_vae, f.size, f),
        "unet": unet,
    }


def _audio_parts(f: MiniFigures, captions: Sequence[str]) -> dict[str, Any]:
    tokenizer = roberta_tokenizer(captions, f.text_tokens)
    unet = UNet2DConditionModel(
        sample_size=_latent_size(f.sound_frames, f.audio_vae),
        in_channels=f.audio_latents,
        out_channels=f.audio_latents,
        # As in AudioLDM the caption comes in with the time; "cross" attention looks at itself.
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=f.sound_width,
        class_embeddings_concat=True,
        cross_attention_dim=f.audio_unet,
        attention_head_dim=_heads(f.audio_unet, f),
        **_unet_blocks(f.audio_unet, f, "2D"),
    )
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=f.mel_bins,
            sampling_rate=f.sample_rate,
            upsample_initial_channel=f.vocoder_channels,
            upsample_rates=f.upsampling,
            # Kernel minus stride is even, so that a frame becomes exactly `hop` samples.
            upsample_kernel_sizes=[2 * rate + rate % 2 for rate in f.upsampling],
            resblock_kernel_sizes=(3, 7),
            resblock_dilation_sizes=((1, 3, 5), (1, 3, 5)),
            normalize_before=False,
        )
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": _clap(tokenizer, f),
        "vae": _vae(1, f.audio_latents, f.audio_vae, f.sound_frames, f),
        "unet": unet,
        "vocoder": vocoder,
    }


_PARTS: dict[Modality, Callable[[MiniFigures, Sequence[str]], dict[str, Any]]] = {
    "image": _image_parts,
    "video": _video_parts,
    "audio": _audio_parts,
}


def _clip(tokenizer: CLIPTokenizer, f: MiniFigures) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            projection_dim=f.text_width,
            max_position_embeddings=f.text_tokens,
            **_text(tokenizer, f),
        )
    )


def _clap(tokenizer: PreTrainedTokenizerBase, f: MiniFigures) -> ClapTextModelWithProjection:
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


def _vae(
    channels: int, latents: int, widths: tuple[int, ...], size: int, f: MiniFigures
) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=latents,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=f.groups,
        sample_size=size,
    )


def _unet_blocks(widths: tuple[int, ...], f: MiniFigures, kind: str) -> dict[str, Any]:
    """Convolutions alone at the finest resolution, with attention below."""
    below = len(widths) - 1
    return {
        "block_out_channels": widths,
        "down_block_types": (f"DownBlock{kind}",) + (f"CrossAttnDownBlock{kind}",) * below,
        "up_block_types": (f"CrossAttnUpBlock{kind}",) * below + (f"UpBlock{kind}",),
        "layers_per_block": 1,
        "norm_num_groups": f.groups,
    }


def _heads(widths: tuple[int, ...], f: MiniFigures) -> tuple[int, ...]:
    return tuple(width // f.head_width for width in widths)


def _latent_size(size: int, vae: tuple[int, ...]) -> int:
    return size // 2 ** (len(vae) - 1)
