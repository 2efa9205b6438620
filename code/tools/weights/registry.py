"""Registry of pretrained components: title, licence, and download."""

from dataclasses import dataclass

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.model.delta import DELTA_FILE
from nextgpt.model.loading import HUB_NAME, MOVED
from nextgpt.tools.weights.download import (
    Downloader,
    HttpFile,
    HubFolder,
    HubPipeline,
    LocalCommand,
)
from nextgpt.tools.weights.parts import PartName


@dataclass(frozen=True)
class Source:
    """Source of a component.

    Attributes:
        licence: as its authors state it.
        next_step: a command to run after the download.
        num_parameters: of a decoder; 0 if unknown.
    """

    title: str
    licence: str
    downloader: Downloader
    next_step: str = ""
    num_parameters: int = 0


def source_of(part: PartName, path: str) -> Source | None:
    """Return the source of the component configured as `path`; None if unknown."""
    path = MOVED.get(path, path)
    if path in SOURCES:
        return SOURCES[path]
    if part in MODALITIES and HUB_NAME.fullmatch(path):
        return Source(path, "see its card", HubPipeline(path, part))
    if part == "language_model" and HUB_NAME.fullmatch(path):
        return Source(path, "see its card", LocalCommand(("hf", "download", path)))
    return None


def _hub_decoder(
    repo: str, modality: Modality, title: str, licence: str, num_parameters: int
) -> dict[str, Source]:
    source = Source(title, licence, HubPipeline(repo, modality), num_parameters=num_parameters)
    return {repo: source}


def _shipped(path: str, title: str) -> dict[str, Source]:
    restore = LocalCommand(("git", "checkout", "--", path))
    return {path: Source(title, "the project's own (BSD 3-Clause)", restore)}


_VICUNA = "ckpt/pretrained_ckpt/vicuna_ckpt/7b_v0"
_BUILD = ("python", "-m", "nextgpt.mini_world.build_components", "--only", "language_model")
# By the path in the shipped configurations. The terms are those of the table in docs/weights.md.
SOURCES: dict[str, Source] = {
    "ckpt/pretrained_ckpt/imagebind_ckpt/huge/imagebind_huge.pth": Source(
        "ImageBind huge",
        "CC BY-NC 4.0 (its model card: BY-NC-SA 4.0)",
        HttpFile("https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth"),
    ),
    _VICUNA: Source(
        "LLaMA-1 7B and Vicuna-7B v0 delta, merged",
        "LLaMA: non-commercial research; the delta's card: Apache-2.0",
        HubFolder("lmsys/vicuna-7b-delta-v0", folder_suffix="_delta"),
        next_step=f"python merge_vicuna.py --base LLAMA_FOLDER --delta {_VICUNA}_delta "
        "(LLaMA-1 itself: see ckpt/pretrained_ckpt/prepare_vicuna.md)",
    ),
    **_hub_decoder(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "image",
        "Stable Diffusion v1-5",
        "CreativeML OpenRAIL-M",
        1_066_235_307,
    ),
    **_hub_decoder(
        "cerspense/zeroscope_v2_576w", "video", "ZeroScope v2 576w", "CC BY-NC 4.0", 1_835_275_563
    ),
    **_hub_decoder(
        "cvssp/audioldm-l-full", "audio", "AudioLDM l-full", "CC BY-NC-SA 4.0", 975_082_866
    ),
    "ckpt/delta_ckpt/nextgpt/7b_tiva_v0": Source(
        "NExT-GPT 7b_tiva_v0, tuned",
        "see its card",
        HubFolder("ChocoWu/nextgpt_7b_tiva_v0", ("pytorch_model.pt",)),
    ),
    "ckpt/pretrained_ckpt/smollm2_ckpt/135m_instruct": Source(
        "SmolLM2-135M-Instruct", "Apache-2.0", LocalCommand(_BUILD, "code")
    ),
    **_shipped("ckpt/pretrained_ckpt/imagebind_ckpt/mini", "mini ImageBind"),
    **_shipped("ckpt/pretrained_ckpt/mini_stable_diffusion", "mini Stable Diffusion"),
    **_shipped("ckpt/pretrained_ckpt/mini_zeroscope", "mini ZeroScope"),
    **_shipped("ckpt/pretrained_ckpt/mini_audioldm", "mini AudioLDM"),
    "ckpt/delta_ckpt/nextgpt/mini_tiva_v0": Source(
        "tuned parameters of the mini system",
        "the project's own (BSD 3-Clause)",
        LocalCommand(
            ("git", "checkout", "--", f"ckpt/delta_ckpt/nextgpt/mini_tiva_v0/{DELTA_FILE}")
        ),
    ),
}
