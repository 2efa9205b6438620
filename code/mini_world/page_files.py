"""Write the page's files for the mini system: the caption bank and the examples.

python -m nextgpt.mini_world.page_files writes both into code/mini_world/; they are committed.
"""

from itertools import product
from pathlib import Path

from nextgpt.common.cli import run_cli
from nextgpt.common.json_io import to_json
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.mini_world.captions import sample_caption
from nextgpt.mini_world.media_set import seeded_rng
from nextgpt.mini_world.objects import COLOURS, COUNTS, MOTIONS, PLACES, SHAPES, SIZES, WorldObject
from nextgpt.mini_world.write_data import write_examples

BANK = Path(__file__).with_name("caption_bank.json")
EXAMPLES = Path(__file__).with_name("demo_examples")
_SEED = 0


def bank_captions(modality: Modality) -> list[str]:
    """Return a caption of each object that differs in this modality; deterministic."""
    rng = seeded_rng(_SEED, f"caption bank {modality}")
    if modality == "audio":
        objects = [
            WorldObject(shape, "red", size, "middle", None, count)
            for shape, size, count in product(SHAPES, SIZES, COUNTS)
        ]
    else:
        motions = MOTIONS if modality == "video" else (None,)
        objects = [
            WorldObject(shape, colour, size, place, motion, 1)
            for shape, colour, size, place, motion in product(
                SHAPES, COLOURS, SIZES, PLACES, motions
            )
        ]
    return [sample_caption(one, modality, rng) for one in objects]


def write_caption_bank(path: Path) -> None:
    """Write the captions of all modalities as JSON, 200 kB."""
    bank = {modality: bank_captions(modality) for modality in MODALITIES}
    path.write_text(to_json(bank, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def main() -> None:
    """Write both."""
    write_caption_bank(BANK)
    write_examples(EXAMPLES, _SEED)


if __name__ == "__main__":
    run_cli(main)
