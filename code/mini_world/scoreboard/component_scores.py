"""Scores of the frozen parts alone, on what they never saw: what the whole system cannot exceed.

Decoders: own text encoder, true caption, and the judge looks at what comes out. Encoder: which of
100 captions is nearest to a medium? Half of the things are of the split's pairs, the others of
training pairs, all in the split's wordings.
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
from nextgpt.evaluation.metrics import proportion
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.transforms import load_views
from nextgpt.media.writing import SUFFIXES, Output
from nextgpt.mini_world.captions import caption
from nextgpt.mini_world.media_set import write_medium
from nextgpt.mini_world.mini_encoder import TEXT_TOWER
from nextgpt.mini_world.mini_tokenizers import tokenize
from nextgpt.mini_world.objects import ATTRIBUTES, Split, WorldObject, sample_object
from nextgpt.mini_world.scoreboard.judge import judge
from nextgpt.mini_world.scoreboard.plots import draw_grid
from nextgpt.mini_world.scoreboard.runner import in_batches
from nextgpt.model.build import build_media_encoder, resolve_model_path
from nextgpt.model.decoders import Decoder

CANDIDATES = 100
_SHOWN = 16  # media a kind in the picture


def score_components(
    config: Config,
    components: Sequence[str],
    *,
    samples: int,
    seed: int,
    split: Split,
    out: Path,
) -> None:
    """Score `parts` (modalities, and "encoder"), print, and write `parts.json` and a picture each.

    Args:
        samples: things a modality.
        out: gets the files.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for modality in MODALITIES:
        if modality in components:
            figures[modality] = _score_decoder(config, modality, samples, seed, out, split)
            print(f"{modality} decoder: {_line(figures[modality])}", flush=True)
    if "encoder" in components:
        figures["encoder"] = _score_encoder(config, samples, seed, split)
        for modality, found in figures["encoder"].items():
            print(f"encoder, {modality} among {CANDIDATES} captions: {found['right']:.1%}")
    with atomic_write(out / "parts.json") as aside:
        record = {"split": split, "samples": samples, "seed": seed, **figures}
        aside.write_text(to_json(record, indent=1) + "\n")


def captioned_things(
    count: int, modality: Modality, seed: int, split: Split
) -> list[tuple[WorldObject, str]]:
    """Draw things with full captions in the split's wordings, every second of a pair of `split`."""
    rng = np.random.default_rng([seed, MODALITIES.index(modality)])
    things = [sample_object(rng, split if n % 2 else "training") for n in range(count)]
    return [(thing, caption(thing, modality, rng, split=split)) for thing in things]


def _score_decoder(
    config: Config, modality: Modality, samples: int, seed: int, out: Path, split: Split
) -> dict[str, Any]:
    """Shares of media with every attribute right, and with each, seen and held-out pairs apart."""
    decoder = Decoder(modality, resolve_model_path(config.decoders[modality].path), choose_device())
    options = GenerationSettings.from_config(config).decode[modality]
    cases = captioned_things(samples, modality, seed, split)
    made: list[Output] = []
    with tqdm(total=samples, desc=f"{modality} decoder") as bar:
        for batch in in_batches(cases):
            embeddings = decoder.text_encoder.encode([text for _, text in batch])
            seeds = tuple(range(seed + len(made), seed + len(made) + len(batch)))
            made += decoder.decode(embeddings, replace(options, seed=seeds))
            bar.update(len(batch))
    rights = []
    for (thing, _), medium in zip(cases, made, strict=True):
        seen = judge(modality, medium)
        rights.append({n: seen[n] == getattr(thing, n) for n in ATTRIBUTES[modality]})
    draw_grid(made[:_SHOWN], [text for _, text in cases[:_SHOWN]], out / f"{modality}.png")
    whole = [all(right.values()) for right in rights]
    return {
        "all": proportion(whole),
        "seen_pairs": proportion(whole[::2]),
        "held_out_pairs": proportion(whole[1::2]),
        "attributes": {n: proportion([right[n] for right in rights]) for n in ATTRIBUTES[modality]},
    }


def _line(figures: dict[str, Any]) -> str:
    each = ", ".join(f"{n} {found['right']:.1%}" for n, found in figures["attributes"].items())
    return f"every attribute right {figures['all']['right']:.1%} ({each})"


def _score_encoder(config: Config, samples: int, seed: int, split: Split) -> dict[str, Any]:
    """How often a medium's own caption is the nearest of 100 that differ from it."""
    imagebind = build_media_encoder(config)
    folder = project_path(config.encoder.path) / TEXT_TOWER
    tower = CLIPTextModelWithProjection.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    found = {}
    for modality in MODALITIES:
        rng = np.random.default_rng([seed, 9])
        rights = []
        with TemporaryDirectory() as place, torch.no_grad():
            for number, (thing, text) in enumerate(
                tqdm(captioned_things(samples, modality, seed, split), f"encoder, {modality}")
            ):
                path = Path(place) / f"{split}_{number:06d}{SUFFIXES[modality]}"
                write_medium(path, modality, thing, seed + 1)
                feature_D = imagebind.encode(modality, load_views(modality, path)[None])[0]
                texts = [text, *_other_captions(thing, modality, rng, split)]
                rights.append(_nearest(tower, tokenizer, texts, feature_D) == 0)
        found[modality] = proportion(rights)
    return found


def _other_captions(
    thing: WorldObject, modality: Modality, rng: np.random.Generator, split: Split
) -> list[str]:
    """99 captions of things that differ from `thing` in what this medium shows."""
    texts: list[str] = []
    own = thing.attributes(modality)
    while len(texts) < CANDIDATES - 1:
        other = sample_object(rng, split if rng.random() < 0.5 else "training")
        if other.attributes(modality) != own:
            texts.append(caption(other, modality, rng, split=split))
    return texts


def _nearest(
    tower: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    texts: list[str],
    feature_D: Tensor,
) -> int:
    tokens = tokenize(tokenizer, texts)
    texts_ND = normalize(tower(tokens.input_ids).text_embeds, dim=-1)
    return int((texts_ND @ feature_D).argmax())
