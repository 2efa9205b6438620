"""The mini Stable Diffusion, ZeroScope and AudioLDM: small instances of their diffusers pipelines.

The classes and folder format are those of the full-size decoders. `MiniDecoderConfig` holds all
sizes; `component_training` trains the modules.
"""

from collections.abc import Mapping, Sequence
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
from nextgpt.decoders.log_mel import LogMel
from nextgpt.mini_world.mini_tokenizers import build_clip_tokenizer, build_roberta_tokenizer

DECODER_FOLDERS: dict[Modality, str] = {
    "image": "mini_stable_diffusion",
    "video": "mini_zeroscope",
    "audio": "mini_audioldm",
}


@dataclass(frozen=True)
class MiniDecoderConfig:
    """Sizes of the three pipelines. Channels are given per resolution, from fine to coarse."""

    # Text encoders: CLIP for image and video, CLAP for audio.
    text_width: int = 192
    text_layers: int = 3
    text_heads: int = 6
    text_feedforward: int = 512
    text_tokens: int = 24  # captions are padded and truncated to this length
    audio_embed_dim: int = 256  # projection of CLAP: the embedding of a caption of a sound

    norm_groups: int = 16  # of the UNets; divides all their channels
    head_dim: int = 32  # of the UNets' attention
    latent_channels: int = 12
    vae_channels: tuple[int, ...] = (24, 48, 64, 64)  # 8 x 8 latents of a frame or spectrogram
    vae_norm_groups: int = 4  # groups of one channel would lose brightness and colour

    image_size: int = 64  # pixels, height and width of images and frames
    image_unet_channels: tuple[int, ...] = (80, 128)  # of image and video

    sample_rate: int = 16000  # Hz
    # Their product is the hop length, 31 ms. The vocoder's output for a steady tone has the period
    # of a frame, which quantizes pitch to multiples of 32 Hz; a shorter hop would be coarser.
    upsample_rates: tuple[int, ...] = (1, 1, 500)
    mel_frames: int = 64  # 2 s
    mel_bins: int = 64
    mel_fft: int = 1024  # samples of a window, 64 ms
    audio_unet_channels: tuple[int, ...] = (64, 128)
    vocoder_channels: int = 256  # halved after each upsampling

    @property
    def hop_length(self) -> int:
        """Samples per mel frame."""
        return prod(self.upsample_rates)


MINI_DECODERS = MiniDecoderConfig()
# Proportion of the initial noise that all frames of a video share (the mixed noise model of arXiv
# 2305.10474): frames start as the same image, so that only the motion has to be learned.
SHARED_NOISE = 0.95
# Arguments of StableDiffusionPipeline.
NO_SAFETY_CHECKER = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def build_mini_decoder(
    modality: Modality,
    folder: Path,
    seed: int,
    captions: Sequence[str],
    config: MiniDecoderConfig = MINI_DECODERS,
    trained: Mapping[str, Any] | None = None,
) -> None:
    """Write one pipeline to `folder` in diffusers format and float16, atomically.

    Args:
        seed: seed of the random weights; the global random state is kept.
        captions: captions whose words become tokens.
        trained: trained modules by diffusers' names; the others get random weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Copies, since the pipeline converts its modules to half precision in place.
        modules = _random_modules(modality, config, captions) | deepcopy(dict(trained or {}))
        pipeline_class = MODALITIES[modality].decoder_class.pipeline_class()
        pipeline: DiffusionPipeline = pipeline_class(scheduler=build_scheduler(), **modules)
    with atomic_write(folder) as temporary:
        pipeline.to(dtype=torch.float16).save_pretrained(temporary, safe_serialization=True)
        if modality == "audio":
            log_mel_of(config).save(temporary)


def build_scheduler() -> DDIMScheduler:
    """Build a DDIM scheduler (arXiv 2010.02502) with Stable Diffusion's betas, for 20 steps.

    With v-prediction and zero terminal SNR (arXiv 2305.08891) the mean brightness is preserved.
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


def _random_modules(
    modality: Modality, config: MiniDecoderConfig, captions: Sequence[str]
) -> dict[str, Any]:
    """Build a pipeline's modules with random weights, by diffusers' names."""
    if modality == "audio":
        tokenizer = build_roberta_tokenizer(captions, config.text_tokens)
        return {
            "tokenizer": tokenizer,
            "text_encoder": build_clap_text_model(tokenizer, config),
            "vae": build_vae(1, config.mel_frames, config),
            "unet": build_unet("audio", config),
            "vocoder": build_vocoder(config),
        }
    tokenizer = build_clip_tokenizer(captions, config.text_tokens)
    modules = {
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(clip_text_config(tokenizer, config)),
        "vae": build_vae(3, config.image_size, config),
        "unet": build_unet(modality, config),
    }
    return modules | NO_SAFETY_CHECKER if modality == "image" else modules


def clip_text_config(tokenizer: CLIPTokenizer, config: MiniDecoderConfig) -> CLIPTextConfig:
    """Configure the CLIP text encoder; only the media encoder's text tower has the projection."""
    return CLIPTextConfig(
        projection_dim=config.audio_embed_dim,
        max_position_embeddings=config.text_tokens,
        **_text(tokenizer, config),
    )


def build_clap_text_model(
    tokenizer: PreTrainedTokenizerBase, config: MiniDecoderConfig
) -> ClapTextModelWithProjection:
    """Build CLAP's text encoder with random weights."""
    return ClapTextModelWithProjection(
        ClapTextConfig(
            projection_dim=config.audio_embed_dim,
            # AudioLDM pads empty prompts to the embedding's width; RoBERTa offsets positions by 2.
            max_position_embeddings=config.audio_embed_dim + 2,
            **_text(tokenizer, config),
        )
    )


def _text(tokenizer: PreTrainedTokenizerBase, config: MiniDecoderConfig) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "intermediate_size": config.text_feedforward,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_vae(channels: int, size: int, config: MiniDecoderConfig) -> AutoencoderKL:
    """Build a VAE with random weights for inputs of `size` x `size`."""
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=config.latent_channels,
        block_out_channels=config.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * len(config.vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(config.vae_channels),
        layers_per_block=1,
        norm_num_groups=config.vae_norm_groups,
        sample_size=size,
        scaling_factor=1.0,  # training folds the latents' mean and deviation into the weights
    )


def build_unet(
    modality: Modality, config: MiniDecoderConfig
) -> UNet2DConditionModel | UNet3DConditionModel:
    """Build a UNet with random weights: convolutions at the finest resolution, attention below."""
    audio = modality == "audio"
    widths = config.audio_unet_channels if audio else config.image_unet_channels
    kind, below = "3D" if modality == "video" else "2D", len(widths) - 1
    size = config.mel_frames if audio else config.image_size
    arguments: dict[str, Any] = {
        "sample_size": size // 2 ** (len(config.vae_channels) - 1),  # of the latents
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "block_out_channels": widths,
        "down_block_types": (f"DownBlock{kind}",) + (f"CrossAttnDownBlock{kind}",) * below,
        "up_block_types": (f"CrossAttnUpBlock{kind}",) * below + (f"UpBlock{kind}",),
        "layers_per_block": 1,
        "norm_num_groups": config.norm_groups,
    }
    if modality == "video":
        return UNet3DConditionModel(
            cross_attention_dim=config.text_width, attention_head_dim=config.head_dim, **arguments
        )
    # diffusers takes the number of heads under this name.
    arguments["attention_head_dim"] = tuple(width // config.head_dim for width in widths)
    if modality == "image":
        return UNet2DConditionModel(
            cross_attention_dim=config.text_width, use_linear_projection=True, **arguments
        )
    return UNet2DConditionModel(
        # As in AudioLDM, the caption embedding is concatenated to the time embedding, and the
        # "cross" attention is self-attention.
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=config.audio_embed_dim,
        class_embeddings_concat=True,
        cross_attention_dim=widths,
        **arguments,
    )


def log_mel_of(config: MiniDecoderConfig) -> LogMel:
    """The spectrogram that VAE and vocoder are trained on; most log amplitudes are in -1..1."""
    return LogMel(
        rate=config.sample_rate,
        hop_length=config.hop_length,
        bins=config.mel_bins,
        fft=config.mel_fft,
        min_frequency=40.0,
        mean=-5.0,
        scale=5.0,
        peak=None,
    )


def build_vocoder(config: MiniDecoderConfig) -> SpeechT5HifiGan:
    """Build a vocoder with random weights; its input is the VAE's log-mel spectrogram."""
    return SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=config.mel_bins,
            sampling_rate=config.sample_rate,
            upsample_initial_channel=config.vocoder_channels,
            upsample_rates=config.upsample_rates,
            # Kernel minus stride is even, so that a frame becomes exactly `hop_length` samples.
            upsample_kernel_sizes=[2 * rate + rate % 2 for rate in config.upsample_rates],
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3),),
            normalize_before=False,
        )
    )
