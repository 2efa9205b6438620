"""Held-out scores of the frozen components alone: upper bounds for the whole system.

Decoders: the judge scores media decoded from true captions. Encoder: retrieval of a medium's
caption among 100. Half of the objects are held-out pairs of the split, half training pairs, all in
the split's wordings.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from nextgpt.common.device import choose_device
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.decoders.pipelines import build_decoder
from nextgpt.evaluation.metrics import proportion
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.transforms import load_views
from nextgpt.media.writing import Output
from nextgpt.mini_world.captions import sample_caption
from nextgpt.mini_world.media_set import write_medium
from nextgpt.mini_world.mini_encoder import TEXT_TOWER
from nextgpt.mini_world.mini_tokenizers import tokenize_captions
from nextgpt.mini_world.objects import ATTRIBUTES, Split, WorldObject, sample_object
from nextgpt.mini_world.scoreboard.judge import judge
from nextgpt.mini_world.scoreboard.plots import draw_grid
from nextgpt.mini_world.scoreboard.runner import batched
from nextgpt.model.build import build_media_encoder
from nextgpt.model.loading import resolve_model_path

CANDIDATES = 100
_SHOWN = 16  # media per plot


def score_components(
    config: Config,
    components: Sequence[str],
    *,
    samples: int,
    seed: int,
    split: Split,
    out: Path,
) -> None:
    """Score `components` (modalities and "encoder"); print, write `parts.json` and a plot each.

    Args:
        samples: objects per modality.
        out: output folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    metrics: dict[str, Any] = {}
    for modality in MODALITIES:
        if modality in components:
            metrics[modality] = _score_decoder(config, modality, samples, seed, out, split)
            print(f"{modality} decoder: {_line(metrics[modality])}", flush=True)
    if "encoder" in components:
        metrics["encoder"] = _score_encoder(config, samples, seed, split)
        for modality, found in metrics["encoder"].items():
            print(f"encoder, {modality} among {CANDIDATES} captions: {found['right']:.1%}")
    with atomic_write(out / "parts.json") as partial:
        record = {"split": split, "samples": samples, "seed": seed, **metrics}
        partial.write_text(to_json(record, indent=1) + "\n")


def _sample_captioned(
    count: int, modality: Modality, seed: int, split: Split
) -> list[tuple[WorldObject, str]]:
    """Sample objects with full captions, every second of a held-out pair."""
    rng = np.random.default_rng([seed, list(MODALITIES).index(modality)])
    objects = [sample_object(rng, split if n % 2 else "training") for n in range(count)]
    return [(obj, sample_caption(obj, modality, rng, split=split)) for obj in objects]


def _score_decoder(
    config: Config, modality: Modality, samples: int, seed: int, out: Path, split: Split
) -> dict[str, Any]:
    """Return the accuracy of media, in total, by seen and held-out pairs, and by attribute."""
    decoder = build_decoder(
        modality, resolve_model_path(config.decoders[modality].path), choose_device()
    )
    settings = GenerationSettings.from_config(config).decode[modality]
    cases = _sample_captioned(samples, modality, seed, split)
    outputs: list[Output] = []
    with tqdm(total=samples, desc=f"{modality} decoder", disable=None) as bar:
        for batch in batched(cases):
            embeddings = decoder.text_encoder.encode([text for _, text in batch])
            seeds = tuple(range(seed + len(outputs), seed + len(outputs) + len(batch)))
            outputs += decoder.decode(embeddings, replace(settings, seed=seeds))
            bar.update(len(batch))
    rights = []
    for (obj, _), medium in zip(cases, outputs, strict=True):
        judged = judge(modality, medium)
        rights.append({n: judged[n] == getattr(obj, n) for n in ATTRIBUTES[modality]})
    draw_grid(outputs[:_SHOWN], [text for _, text in cases[:_SHOWN]], out / f"{modality}.png")
    whole = [all(right.values()) for right in rights]
    return {
        "all": proportion(whole),
        "seen_pairs": proportion(whole[::2]),
        "held_out_pairs": proportion(whole[1::2]),
        "attributes": {n: proportion([right[n] for right in rights]) for n in ATTRIBUTES[modality]},
    }


def _line(metrics: dict[str, Any]) -> str:
    each = ", ".join(f"{n} {found['right']:.1%}" for n, found in metrics["attributes"].items())
    return f"every attribute right {metrics['all']['right']:.1%} ({each})"


def _score_encoder(config: Config, samples: int, seed: int, split: Split) -> dict[str, Any]:
    """Return the retrieval accuracy: a medium's caption among 99 captions of other objects."""
    imagebind = build_media_encoder(config)
    folder = project_path(config.encoder.path) / TEXT_TOWER
    tower = CLIPTextModelWithProjection.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    found = {}
    for modality in MODALITIES:
        rng = np.random.default_rng([seed, 9])
        rights = []
        with TemporaryDirectory() as folder_name, torch.no_grad():
            captioned = _sample_captioned(samples, modality, seed, split)
            bar = tqdm(captioned, f"encoder, {modality}", disable=None)
            for number, (obj, text) in enumerate(bar):
                path = Path(folder_name) / f"{split}_{number:06d}{MODALITIES[modality].suffix}"
                write_medium(path, modality, obj, seed + 1)
                feature_D = imagebind.encode(modality, load_views(modality, path)[None])[0]
                texts = [text, *_other_captions(obj, modality, rng, split)]
                rights.append(_nearest(tower, tokenizer, texts, feature_D) == 0)
        found[modality] = proportion(rights)
    return found


def _other_captions(
    obj: WorldObject, modality: Modality, rng: np.random.Generator, split: Split
) -> list[str]:
    """Sample 99 captions of objects that differ from `obj` in this modality's attributes."""
    texts: list[str] = []
    attributes = obj.attributes(modality)
    while len(texts) < CANDIDATES - 1:
        other = sample_object(rng, split if rng.random() < 0.5 else "training")
        if other.attributes(modality) != attributes:
            texts.append(sample_caption(other, modality, rng, split=split))
    return texts


def _nearest(
    tower: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    texts: list[str],
    feature_D: Tensor,
) -> int:
    tokens = tokenize_captions(tokenizer, texts)
    texts_ND = normalize(tower(tokens.input_ids).text_embeds, dim=-1)
    return int((texts_ND @ feature_D).argmax())
