"""Media features per second: one medium at a time in float32, as in training, and in batches.

    python benchmarks/features.py [--config mini] [--media 64] [--batch_size 16] [--rounds 5]

Media of the mini world are rendered and decoded first; a video of it has one distinct view, so
videos of noise with 15 distinct views are measured too. In each round every way encodes the same
media, one way after the other. Printed are medians over the rounds of media per second and of the
ratios within a round. `decoded` is for comparison: media per second that one process decodes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from nextgpt.common.cli import run_cli
from nextgpt.common.device import choose_device
from nextgpt.config.loader import load_config
from nextgpt.conversation.batch import UnencodedMedium
from nextgpt.dataset.conversations import open_conversations
from nextgpt.media.transforms import VIEWS, load_views
from nextgpt.mini_world.write_data import write_world
from nextgpt.tools.encode_media import list_input_media
from nextgpt.training.media_features import MediaEncoder
from training_step import seconds

Media = list[UnencodedMedium]
WAYS = ("one by one", "batches", "batches, bf16")


def decoded_media(folder: Path, count: int) -> dict[str, tuple[Media, float]]:
    """`count` decoded media of each modality, and the seconds that decoding one took."""
    write_world(folder / "data" / "mini_world", scale=count / 100, progress=False)
    paths = [f"data.data_dir={folder / 'data'}", f"data.cache_dir={folder / 'cache'}"]
    found = list_input_media(open_conversations(load_config("mini", 1, paths).data))
    media: dict[str, tuple[Media, float]] = {}
    for modality, shown in found.items():
        files = [one.medium.path for one in shown[:count]]
        start = time.perf_counter()
        decoded = [UnencodedMedium(modality, load_views(modality, file), None) for file in files]
        media[modality] = decoded, (time.perf_counter() - start) / len(files)
    noise = torch.Generator().manual_seed(0)
    shape = media["video"][0][0].views.shape
    views = [torch.randn(shape, generator=noise) for _ in range(max(1, count // 4))]
    media["video, 15 views"] = [UnencodedMedium("video", one, None) for one in views], 0.0
    return media


def encode_in_batches(encoder: MediaEncoder, media: Media, size: int) -> None:
    """Encode `media`, `size` at a time."""
    for start in range(0, len(media), size):
        encoder.encode(media[start : start + size])


def ways_of(config_name: str, batch_size: int) -> list[Callable[[Media], None]]:
    """The ways to encode, in the order of `WAYS`."""
    device = choose_device()
    single, half = (
        MediaEncoder(load_config(config_name, 1, sets), device)
        for sets in ([], ["data.feature_precision=bf16"])
    )

    def together(encoder: MediaEncoder, media: Media) -> None:
        encode_in_batches(encoder, media, max(1, batch_size // VIEWS[media[0].modality]))

    return [
        lambda media: encode_in_batches(single, media, 1),
        lambda media: together(single, media),
        lambda media: together(half, media),
    ]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="mini")
    parser.add_argument("--media", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16, help="in views")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    ways = ways_of(arguments.config, arguments.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        measured = decoded_media(Path(folder), arguments.media)
    print("| media | number | decoded |", " | ".join(WAYS), "| ratio | ratio, bf16 |")
    print("| --- |" + " --- |" * (len(WAYS) + 4))
    for name, (media, decoding) in measured.items():
        for way in ways:
            way(media[:2])  # warms up
        rounds = [[seconds(partial(w, media)) for w in ways] for _ in range(arguments.rounds)]
        rates = [len(media) / statistics.median(column) for column in zip(*rounds, strict=True)]
        ratios = [statistics.median(one[0] / one[n] for one in rounds) for n in (1, 2)]
        cells = [f"{1 / decoding:.0f}" if decoding else "", *(f"{rate:.1f}" for rate in rates)]
        print(
            f"| {name} | {len(media)} |", " | ".join([*cells, *(f"{r:.2f}" for r in ratios)]), "|"
        )


if __name__ == "__main__":
    run_cli(main)
