"""The three published decoders with random weights: their shapes, for measurements without them.

The figures are those of the published folders' configurations; the parameter counts are tested
against the paper's.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from transformers import (
    ClapTextConfig,
    ClapTextModelWithProjection,
    CLIPTextConfig,
    CLIPTextModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from nextgpt.common.io import atomic_write
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.mini_world.mini_decoders import NO_SAFETY_CHECKER
from nextgpt.mini_world.mini_tokenizers import build_clip_tokenizer, build_roberta_tokenizer


def _vae(channels: int, latents: int, widths: tuple[int, ...]) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=latents,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        sample_size=512,
    )


def _clip(width: int, layers: int, heads: int) -> CLIPTextModel:
    figures = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    return CLIPTextModel(figures)


def _seen_networks(text_encoder: CLIPTextModel, unet_class: type, **figures: int) -> dict[str, Any]:
    """What Stable Diffusion and ZeroScope have in common, around their own figures."""
    return {
        "text_encoder": text_encoder,
        "vae": _vae(3, 4, (128, 256, 512, 512)),
        "unet": unet_class(
            cross_attention_dim=text_encoder.config.hidden_size,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            **figures,
        ),
    }


def image_networks() -> dict[str, Any]:
    """Stable Diffusion v1-5's."""
    text_encoder = _clip(768, 12, 12)
    return _seen_networks(text_encoder, UNet2DConditionModel, sample_size=64, attention_head_dim=8)


def video_networks() -> dict[str, Any]:
    """ZeroScope v2 576w's."""
    text_encoder = _clip(1024, 23, 16)
    return _seen_networks(text_encoder, UNet3DConditionModel, sample_size=32, attention_head_dim=64)


def audio_networks() -> dict[str, Any]:
    """AudioLDM l-full's."""
    widths = (256, 512, 768, 1280)
    return {
        "text_encoder": ClapTextModelWithProjection(ClapTextConfig(projection_dim=512)),
        "vae": _vae(1, 8, (128, 256, 512)),
        "unet": UNet2DConditionModel(
            sample_size=128,
            in_channels=8,
            out_channels=8,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            layers_per_block=2,
            attention_head_dim=tuple(width // 32 for width in widths),
            cross_attention_dim=widths,
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=512,
            class_embeddings_concat=True,
        ),
        "vocoder": SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=64,
                upsample_initial_channel=1024,
                upsample_rates=(5, 4, 2, 2, 2),
                upsample_kernel_sizes=(16, 16, 8, 4, 4),
                normalize_before=False,
            )
        ),
    }


NETWORKS = {"image": image_networks, "video": video_networks, "audio": audio_networks}


def write_random_decoder(modality: Modality, folder: Path) -> None:
    """Write the pipeline with random weights in half precision, in diffusers' format."""
    words = ["anything at all"]
    tokenizer = (
        build_roberta_tokenizer(words, 512)
        if modality == "audio"
        else build_clip_tokenizer(words, 77)
    )
    networks = NETWORKS[modality]()
    unchecked = NO_SAFETY_CHECKER if modality == "image" else {}
    pipeline_class = MODALITIES[modality].decoder_class.pipeline_class()
    pipeline = pipeline_class(
        tokenizer=tokenizer, scheduler=DDIMScheduler(), **networks, **unchecked
    )
    with atomic_write(folder) as aside, torch.no_grad():
        pipeline.to(dtype=torch.float16).save_pretrained(aside, safe_serialization=True)
