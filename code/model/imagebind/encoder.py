"""ImageBind's vision and audio encoders (arXiv 2305.05665): vision transformers over patches.

An image becomes a still clip of two frames, audio its mel spectrogram. Parameter names are those of
`imagebind_huge.pth`. At its size, vision has 633 M parameters and audio 86 M; a view costs about
0.33 TFLOP (image or video clip) or 0.04 TFLOP (audio). A video has 15 views, audio 3.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

Modality = Literal["image", "video", "audio"]
_EPS = 1e-6  # of every layer norm but the audio stem's, which keeps torch's 1e-5


@dataclass(frozen=True)
class TrunkConfig:
    """One transformer."""

    width: int
    blocks: int
    heads: int


@dataclass(frozen=True)
class ImageBindConfig:
    """All sizes of the encoder; the defaults are the published ones."""

    vision: TrunkConfig = TrunkConfig(width=1280, blocks=32, heads=16)
    audio: TrunkConfig = TrunkConfig(width=768, blocks=12, heads=12)
    output_dim: int = 1024
    mlp_ratio: int = 4
    image_size: int = 224  # pixels, both sides
    patch_size: int = 14  # pixels, both sides
    frames: int = 2  # of a video clip; an image is repeated
    mel_bins: int = 128
    audio_frames: int = 204  # of 10 ms
    audio_kernel: int = 16  # mel bins and frames that one audio patch spans
    audio_stride: int = 10  # so neighbouring audio patches overlap


IMAGEBIND_HUGE = ImageBindConfig()


class _Block(nn.Module):
    """Pre-norm transformer block, (N, T, W) -> (N, T, W)."""

    def __init__(self, trunk: TrunkConfig, mlp_ratio: int, *, bias_kv: bool) -> None:
        super().__init__()
        width = trunk.width
        self.attn = nn.MultiheadAttention(width, trunk.heads, add_bias_kv=bias_kv, batch_first=True)
        self.norm_1 = nn.LayerNorm(width, eps=_EPS)
        fc1, fc2 = nn.Linear(width, mlp_ratio * width), nn.Linear(mlp_ratio * width, width)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.norm_2 = nn.LayerNorm(width, eps=_EPS)

    def forward(self, x_NTW: Tensor) -> Tensor:
        normed = self.norm_1(x_NTW)
        x_NTW = x_NTW + self.attn(normed, normed, normed, need_weights=False)[0]
        return x_NTW + self.mlp(self.norm_2(x_NTW))


def _trunk(trunk: TrunkConfig, mlp_ratio: int, *, is_vision: bool) -> nn.Sequential:
    """Transformer blocks; vision has a layer norm before them, audio `bias_kv` in each."""
    norm = [nn.LayerNorm(trunk.width, eps=_EPS)] if is_vision else []
    blocks = (_Block(trunk, mlp_ratio, bias_kv=not is_vision) for _ in range(trunk.blocks))
    first, rest = nn.Sequential(*norm), nn.Sequential(*blocks)
    return nn.Sequential(OrderedDict(pre_transformer_layer=first, blocks=rest))


class _Preprocessor(nn.Module):
    """Patch and position embeddings with a CLS token: views -> (N, 1 + patches, W)."""

    def __init__(self, stem: nn.Module, patches: int, width: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.rgbt_stem = stem
        self.pos_embedding_helper = nn.Module()
        self.pos_embedding_helper.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, width))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embedding_helper.pos_embed, std=0.02)

    def forward(self, views: Tensor) -> Tensor:
        x_NTW = self.rgbt_stem(views)
        cls_N1W = self.cls_token.expand(x_NTW.shape[0], -1, -1)
        return torch.cat([cls_N1W, x_NTW], dim=1) + self.pos_embedding_helper.pos_embed


class _VisionStem(nn.Module):
    """(N, 3, 224, 224) or (N, 3, 2, 224, 224) -> (N, patches, W) by one 3-D convolution."""

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__()
        kernel = (config.frames, config.patch_size, config.patch_size)
        convolution = nn.Conv3d(3, config.vision.width, kernel, stride=kernel, bias=False)
        self.frames = config.frames
        self.proj = nn.Sequential(nn.Identity(), convolution)  # the published name is proj.1

    def forward(self, views: Tensor) -> Tensor:
        if views.ndim == 4:  # an image is a still clip
            views = views.unsqueeze(2).expand(-1, -1, self.frames, -1, -1)
        return self.proj(views).flatten(2).transpose(1, 2)


class _AudioStem(nn.Module):
    """(N, 1, 128, 204) -> (N, patches, W) by one convolution over overlapping patches."""

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__()
        width = config.audio.width
        self.proj = nn.Conv2d(1, width, config.audio_kernel, config.audio_stride, bias=False)
        self.norm_layer = nn.LayerNorm(width)

    def forward(self, views: Tensor) -> Tensor:
        return self.norm_layer(self.proj(views).flatten(2).transpose(1, 2))


def _distinct_views(media: Iterable[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The distinct views of each medium (V, ...), and of every view the number of the equal one."""
    distinct: list[Tensor] = []
    rows: list[int] = []
    for views in media:
        first = len(distinct)
        for view in views:
            alike = (n for n in range(first, len(distinct)) if torch.equal(distinct[n], view))
            rows.append(next(alike, len(distinct)))
            if rows[-1] == len(distinct):
                distinct.append(view)
    return distinct, rows


def _head(width: int, output_dim: int) -> nn.Sequential:
    """(N, W) -> (N, D); the published names are 0 and 2."""
    norm, linear = nn.LayerNorm(width, eps=_EPS), nn.Linear(width, output_dim, bias=False)
    return nn.Sequential(norm, nn.Identity(), linear)


class ImageBind(nn.Module):
    """Embed images, videos and audio into one space of `config.output_dim` dimensions (D)."""

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__()
        self.config = config
        patches = (config.image_size // config.patch_size) ** 2
        vision = _Preprocessor(_VisionStem(config), patches, config.vision.width)
        kernel, stride = config.audio_kernel, config.audio_stride
        rows, columns = (
            (size - kernel) // stride + 1 for size in (config.mel_bins, config.audio_frames)
        )
        audio = _Preprocessor(_AudioStem(config), rows * columns, config.audio.width)
        self.modality_preprocessors = nn.ModuleDict({"vision": vision, "audio": audio})
        trunks = {"vision": config.vision, "audio": config.audio}
        self.modality_trunks = nn.ModuleDict(
            {n: _trunk(t, config.mlp_ratio, is_vision=n == "vision") for n, t in trunks.items()}
        )
        self.modality_heads = nn.ModuleDict(
            {n: _head(t.width, config.output_dim) for n, t in trunks.items()}
        )
        scale = nn.Module()  # unused value of the published file: features stay at unit length
        scale.register_buffer("log_logit_scale", torch.tensor(math.log(20.0)))
        self.modality_postprocessors = nn.ModuleDict({"audio": nn.Sequential(nn.Identity(), scale)})

    def forward_views(self, modality: Modality, views: Tensor) -> Tensor:
        """Unit-length features (N, D) of N single views, normalised.

        Views are (N, 3, 224, 224) image, (N, 3, 2, 224, 224) video or (N, 1, 128, 204) audio.
        """
        trunk = "audio" if modality == "audio" else "vision"
        x_NTW = self.modality_trunks[trunk](self.modality_preprocessors[trunk](views))
        return normalize(self.modality_heads[trunk](x_NTW[:, 0]), dim=-1)  # of the CLS token

    def encode(self, modality: Modality, views: Tensor | Sequence[Tensor]) -> Tensor:
        """Features (B, D) of B media: the mean over each one's views, not normalised again.

        Video and audio have V views each: (B, V, 3, 2, 224, 224) or (B, V, 1, 128, 204). Equal
        views of a medium, as all 15 of a short square video, are encoded once, and only distinct
        ones are copied to the encoder's device.
        """
        device = self.modality_heads["vision"][2].weight.device
        if modality == "image":
            return self.forward_views(modality, torch.stack([*views]).to(device))
        distinct, rows_N = _distinct_views(views)
        features_ND = self.forward_views(modality, torch.stack(distinct).to(device))[rows_N]
        return features_ND.unflatten(0, (len(views), -1)).mean(dim=1)

    forward = encode
