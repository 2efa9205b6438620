"""Write the mini world in the course's data layout.

    python -m nextgpt.mini_world.write_data --out DIR

At scale 1 it takes 11 s on two cores with AVX-512, and 40 MB. The folder appears whole or not at
all, is left alone if it holds the same world already, and otherwise is replaced with all that is in
it, because caption embeddings kept there belong to the old captions.
"""

import argparse
import itertools
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.mini_world.captions import caption, plain_caption
from nextgpt.mini_world.dialogues import CASE_INPUT, OUTPUTS, dialogue, opening
from nextgpt.mini_world.media_set import Album, generator, write_medium
from nextgpt.mini_world.objects import HELD_OUT_PAIRS, WorldObject, changes, sample_object
from nextgpt.mini_world.plain_talk import plain_pairs
from nextgpt.mini_world.questions import ask, ask_world, world_facts
from nextgpt.mini_world.request_templates import COURSE_REQUESTS
from nextgpt.mini_world.words import choose, say, sentence

VERSION = 18  # of the world: raise it when the same seed gives something else
COUNTS = {  # at scale 1
    "pair_image": 600,
    "pair_video": 400,
    "pair_audio": 120,
    "question": 3600,
    "question_image": 400,
    "question_video": 400,
    "question_audio": 100,
    "request": 700,
    "mosit": 2400,
    "mosit_image": 400,
    "mosit_video": 400,
    "mosit_audio": 100,
    "text_world": 600,
    "text_plain": 400,
}
_PLAIN_PAIRS = 0.75  # of the caption pairs
# Of the questions: a description tells all that is seen, but not which thing a sound belongs to.
_DESCRIBING: dict[Modality, float] = {"image": 0.65, "video": 0.65, "audio": 0.4}
# Motions are learned last.
_ASKED_ABOUT: tuple[Modality, ...] = ("image", "video", "video", "audio")
_UNNAMED_COLOURS = 0.1  # of the pictures and videos in pairs and questions
FOLDERS: dict[Modality, str] = {"image": "images", "video": "videos", "audio": "audios"}
Rows = list[dict[str, Any]]
_Media = list[tuple[Path, Album]]  # folder, and the album to be rendered into it
_CELLS: list[tuple[Modality | None, str]] = [
    *((source, goal) for source in (None, *MODALITIES) for goal in OUTPUTS),
    # Several media in one answer are the hardest to learn: as often as three cells.
    *((source, case) for case, source in CASE_INPUT.items() for _ in range(3)),
    *[("video", "video")] * 2,  # edits of a video: the hardest of the cells
]


def write_world(
    out: Path,
    seed: int = 0,
    scale: float = 1.0,
    unnamed_colours: float = _UNNAMED_COLOURS,
    plain_talk: int = COUNTS["text_plain"],
    progress: bool = True,
) -> None:
    """Write the whole world into the folder `out`, unless it is there already.

    Args:
        unnamed_colours: share of the pictures and videos in pairs and questions, see `looks`.
        plain_talk: rows of plain talk at scale 1.

    Raises:
        UserError: `out` holds something else than a mini world, or a number is out of range.
    """
    if not 0 < scale < math.inf:
        raise UserError(f"--scale {scale}: expected a number above 0")
    if seed < 0:
        raise UserError(f"--seed {seed}: expected 0 or more")
    if not 0 <= unnamed_colours <= 1:
        raise UserError(f"--unnamed_colours {unnamed_colours}: expected 0 to 1")
    if plain_talk < 1:
        raise UserError(f"--plain_talk {plain_talk}: expected 1 or more")
    if out.exists() and not (out / "world.json").is_file() and any(out.iterdir()):
        raise UserError(f"{out} holds no mini world (no world.json): name an empty or new folder")
    wanted = COUNTS | {"text_plain": plain_talk}
    counts = {name: max(1, round(count * scale)) for name, count in wanted.items()}
    world = {"version": VERSION, "seed": seed, "scale": scale, "counts": counts}
    world["unnamed_colours"] = unnamed_colours
    world["held_out_pairs"] = {
        split: sorted(map(list, pairs)) for split, pairs in HELD_OUT_PAIRS.items()
    }
    if (out / "world.json").is_file():
        if json.loads((out / "world.json").read_text(encoding="utf-8")) == world:
            print(f"{out} holds this world already")
            return
        print(f"{out} holds another world, which is replaced")
    with atomic_write(out) as aside:
        media = [
            *_write_pairs(aside / "T-X_pair_data", seed, counts, unnamed_colours),
            *_write_instructions(aside / "IT_data", seed, counts, unnamed_colours),
        ]
        _render(media, seed, progress)
        write_examples(aside / "examples", seed)
        _write_json(aside / "world.json", world)
        if out.exists():
            shutil.rmtree(out)


def _write_pairs(folder: Path, seed: int, counts: dict[str, int], unnamed_colours: float) -> _Media:
    media: _Media = []
    for modality in MODALITIES:
        sizes = {modality: counts[f"pair_{modality}"]}
        album = Album("mini_pair", seed, sizes, unnamed_colours=unnamed_colours)
        rng = generator(seed, f"pair captions {modality}")
        rows = [
            {
                "caption": _pair_caption(thing, modality, album.named(name, modality), rng),
                f"{modality}_name": name,
            }
            for name, _, thing in album
        ]
        _write_json(folder / modality / f"{modality}.json", rows)
        media.append((folder / modality / FOLDERS[modality], album))
    return media


def _pair_caption(
    thing: WorldObject, modality: Modality, named: frozenset[str], rng: np.random.Generator
) -> str:
    """Mostly in the plain words of answers, which is what both alignments are used for later."""
    if rng.random() < _PLAIN_PAIRS:
        return plain_caption(thing, modality, named, by_maker=rng.random() < 0.5)
    return caption(thing, modality, rng, named)


def _write_instructions(
    folder: Path, seed: int, counts: dict[str, int], unnamed_colours: float
) -> _Media:
    sizes = {name: {m: counts[f"{name}_{m}"] for m in MODALITIES} for name in ("question", "mosit")}
    albums = {
        "question": Album(
            "mini_question", seed, sizes["question"], unnamed_colours=unnamed_colours
        ),
        "mosit": Album("mini_mosit", seed, sizes["mosit"]),
    }
    question = folder / "T+X-T_data" / "mini_question"
    mosit = folder / "MosIT_data" / "mini_mosit"
    request = folder / "T-T+X_data" / "mini_request"
    _write_json(
        question / "mini_question.json", questions(albums["question"], seed, counts["question"])
    )
    _write_json(request / "mini_request.json", requests(seed, counts["request"]))
    _write_json(mosit / "mini_mosit.json", dialogues(albums["mosit"], seed, counts["mosit"]))
    _write_json(
        folder / "text" / "mini_text.json",
        texts(seed, counts["text_world"], counts["text_plain"]),
    )
    return [(question, albums["question"]), (mosit, albums["mosit"])]


def questions(album: Album, seed: int, count: int) -> Rows:
    """Instruction rows: a medium and a question, answered in words."""
    rng = generator(seed, "questions")
    rows = []
    for _ in range(count):
        modality = choose(rng, _ASKED_ABOUT)
        name, thing = album.draw(modality, rng)
        named = album.named(name, modality)
        question, answer = ask(thing, modality, rng, named, describing=_DESCRIBING[modality])
        rows.append(
            {f"{modality}_name": name, "conversation": _round(question, answer, given=modality)}
        )
    return rows


def requests(seed: int, count: int) -> Rows:
    """Instruction rows: words that ask for one picture, video or sound."""
    rng, album = generator(seed, "requests"), Album("mini_request", seed, {})
    rows = []
    for _ in range(count):
        made = opening(choose(rng, tuple(MODALITIES)), rng)
        words, (modality, text) = made.answer
        turns = _round(made.request, words, made=modality, caption=text)
        rows.append({"mm_name": album.answer_name(modality, text), "conversation": turns})
    return rows


def dialogues(album: Album, seed: int, count: int) -> Rows:
    """In-place rows of one to four rounds; all 16 cells and the course's four cases come first."""
    rng = generator(seed, "dialogues")
    rows = []
    for index in range(count):
        source, goal = _CELLS[index % len(_CELLS)]
        rounds = int(rng.choice(4, p=(0.3, 0.35, 0.2, 0.15))) + 1
        rows.append({"conversation": dialogue(source, goal, rounds, album, rng)})
    return rows


def texts(seed: int, world: int, plain: int) -> Rows:
    """Instruction rows in words alone: about the world's sounds, and plain talk.

    Args:
        world: questions about sounds, besides the facts.
        plain: rows of plain talk; beyond those that there are, they come again.
    """
    rng = generator(seed, "texts")
    pairs = world_facts() + [ask_world(sample_object(rng), rng) for _ in range(world)]
    pairs = list(dict(pairs).items())
    pairs += itertools.islice(itertools.cycle(plain_pairs(rng)), plain)
    return [{"conversation": _round(*pairs[index])} for index in rng.permutation(len(pairs))]


def _round(
    question: str, answer: str, given: str = "text", made: str = "text", caption: str = ""
) -> Rows:
    """One round in the course's instruction format."""
    return [
        {"from": "human", "value": question, "input_modality": given},
        {"from": "gpt", "value": answer, "caption": caption, "output_modality": made},
    ]


def _render(media: _Media, seed: int, progress: bool) -> None:
    jobs = [(folder, album, *one) for folder, album in media for one in album]
    for folder, _ in media:
        folder.mkdir(parents=True, exist_ok=True)

    def render(job: tuple[Path, Album, str, Modality, WorldObject]) -> None:
        folder, album, name, modality, thing = job
        write_medium(folder / name, modality, thing, seed, album.look(name))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rendered = pool.map(render, jobs)
        for _ in tqdm(rendered, "rendering", len(jobs), unit="file", disable=not progress):
            pass


def write_examples(folder: Path, seed: int) -> None:
    """One input for each of the course's four cases, with its medium."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = generator(seed, "examples")
    outputs = {"T": "text", "I": "image", "V": "video", "A": "audio"}
    cases = []
    for number, (name, source) in enumerate(CASE_INPUT.items(), start=1):
        thing = sample_object(rng)
        shown: dict[str, str | None] = dict.fromkeys(MODALITIES)
        if source is not None:
            file = f"mini_example_{source}_{number:06d}{MODALITIES[source].suffix}"
            write_medium(folder / file, source, thing, seed)
            shown[source] = file
        wanted = choose(rng, changes(thing, "colour"))
        text = sentence(say(COURSE_REQUESTS[name].pick(rng), None, wanted))
        expects = [outputs[letter] for letter in name.split("→")[1].split("+")]
        cases.append({"name": name, "text": text, **shown, "expects": expects})
    _write_json(folder / "cases.json", cases)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Read the arguments and write the world."""
    parser = argparse.ArgumentParser(description="Write the mini world in the course's layout.")
    parser.add_argument("--out", type=Path, default=Path("../data/mini_world"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="how many samples; 1 is usual")
    parser.add_argument(
        "--unnamed_colours",
        type=float,
        default=_UNNAMED_COLOURS,
        help="share of pictures and videos in colours that have no name",
    )
    parser.add_argument(
        "--plain_talk",
        type=int,
        default=COUNTS["text_plain"],
        help="rows of plain talk at scale 1",
    )
    arguments = parser.parse_args()
    write_world(**vars(arguments))


if __name__ == "__main__":
    run_cli(main)
