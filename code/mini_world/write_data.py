"""Write the mini world's datasets in the course's layout.

    python -m nextgpt.mini_world.write_data --out DIR

At scale 1 this takes 11 s on two cores with AVX-512, and 40 MB. The folder is written atomically,
and kept if it holds the same world already. A different world is replaced with everything in its
folder, since caption embeddings stored there belong to the old captions.
"""

import argparse
import itertools
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import read_json, to_json
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path
from nextgpt.mini_world.captions import canonical_caption, sample_caption
from nextgpt.mini_world.dialogues import CASE_INPUT, OUTPUTS, DialogueSampler
from nextgpt.mini_world.media_set import MediaSet, seeded_rng, write_medium
from nextgpt.mini_world.objects import (
    HELD_OUT_PAIRS,
    WorldObject,
    attribute_variants,
    sample_object,
)
from nextgpt.mini_world.plain_talk import plain_talk_pairs
from nextgpt.mini_world.questions import sample_question, sample_world_question, world_facts
from nextgpt.mini_world.request_templates import COURSE_REQUESTS
from nextgpt.mini_world.unsupported_requests import sample_unsupported, supported_template
from nextgpt.mini_world.words import as_sentence, choose, fill_template

VERSION = 19  # increment when the same arguments give different data
ROW_COUNTS = {  # at scale 1
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
    "text_unsupported": 0,
}
_CANONICAL_PAIRS = 0.75  # proportion of caption pairs with canonical captions
# Proportion of descriptions among questions. A description covers all that is seen, but not which
# object makes a sound.
_DESCRIBE_PROPORTION: dict[Modality, float] = {"image": 0.65, "video": 0.65, "audio": 0.4}
# Modalities of questions, by weight: motions are learned last.
_QUESTION_MODALITIES: tuple[Modality, ...] = ("image", "video", "video", "audio")
_UNSUPPORTED_EDITS = 0.05  # proportion of later rounds in dialogues, where there are such requests
# Fulfilled requests that are added for each unsupported one, half of them in its wordings: a model
# tuned on unsupported ones alone declines colours and shapes that it has.
_FULFILLED_PER_UNSUPPORTED = 2
_UNNAMED_COLOURS = 0.1  # proportion of the images and videos in pairs and questions
FOLDERS: dict[Modality, str] = {"image": "images", "video": "videos", "audio": "audios"}
Rows = list[dict[str, Any]]
_MediaFolders = list[tuple[Path, MediaSet]]  # folders with the media to be rendered into them
# First exchanges of dialogues, in rotation.
_CELLS: list[tuple[Modality | None, str]] = [
    *((source, goal) for source in (None, *MODALITIES) for goal in OUTPUTS),
    # Answers with several media are the hardest to learn: three times as often as other cells.
    *((source, case) for case, source in CASE_INPUT.items() for _ in range(3)),
    *[("video", "video")] * 2,  # video edits, the hardest of the cells with one medium
]


def write_world(
    out: Path,
    seed: int = 0,
    scale: float = 1.0,
    unnamed_colours: float = _UNNAMED_COLOURS,
    plain_talk: int = ROW_COUNTS["text_plain"],
    unsupported: int = ROW_COUNTS["text_unsupported"],
    progress: bool = True,
) -> None:
    """Write all datasets into the folder `out`, unless it holds the same world already.

    Args:
        unnamed_colours: proportion of the images and videos in pairs and questions that are in
            unnamed colours, see `appearance`.
        plain_talk: rows of plain talk at scale 1.
        unsupported: rows of unsupported requests at scale 1; with any, one later round in twenty of
            the dialogues is an unsupported edit, too, and there are more fulfilled requests.

    Raises:
        UserError: `out` holds something other than a mini world, or a number is out of range.
    """
    _check_arguments(out, seed, scale, unnamed_colours, plain_talk, unsupported)
    row_counts = ROW_COUNTS | {"text_plain": plain_talk, "text_unsupported": unsupported}
    counts = {
        name: round(max(1, count * scale)) if count else 0 for name, count in row_counts.items()
    }
    world = {
        "version": VERSION,
        "seed": seed,
        "scale": scale,
        "counts": counts,
        "unnamed_colours": unnamed_colours,
        "held_out_pairs": {s: sorted(map(list, pairs)) for s, pairs in HELD_OUT_PAIRS.items()},
    }
    if (out / "world.json").is_file():
        if read_json(out / "world.json") == world:
            print(f"{out} holds this world already")
            return
        print(f"{out} holds another world, which is replaced")
    with atomic_write(out) as temporary:
        media = [
            *_write_pairs(temporary / "T-X_pair_data", seed, counts, unnamed_colours),
            *_write_instructions(temporary / "IT_data", seed, counts, unnamed_colours),
        ]
        _render(media, seed, progress)
        write_examples(temporary / "examples", seed)
        _write_json(temporary / "world.json", world)
        if out.exists():
            shutil.rmtree(out)


def _check_arguments(
    out: Path, seed: int, scale: float, unnamed_colours: float, plain_talk: int, unsupported: int
) -> None:
    if not 0 < scale < math.inf:
        raise UserError(f"--scale {scale}: expected a number above 0")
    if seed < 0:
        raise UserError(f"--seed {seed}: expected 0 or more")
    if not 0 <= unnamed_colours <= 1:
        raise UserError(f"--unnamed_colours {unnamed_colours}: expected 0 to 1")
    if plain_talk < 1:
        raise UserError(f"--plain_talk {plain_talk}: expected 1 or more")
    if unsupported < 0:
        raise UserError(f"--unsupported {unsupported}: expected 0 or more")
    if out.exists() and not (out / "world.json").is_file() and any(out.iterdir()):
        raise UserError(f"{out} holds no mini world (no world.json): name an empty or new folder")


def _write_pairs(
    folder: Path, seed: int, counts: dict[str, int], unnamed_colours: float
) -> _MediaFolders:
    media: _MediaFolders = []
    for modality in MODALITIES:
        sizes = {modality: counts[f"pair_{modality}"]}
        media_set = MediaSet("mini_pair", seed, sizes, unnamed_colours=unnamed_colours)
        rng = seeded_rng(seed, f"pair captions {modality}")
        rows = []
        for name, _, obj in media_set:
            known = media_set.visible_attributes(name, modality)
            caption = _pair_caption(obj, modality, known, rng)
            rows.append({"caption": caption, f"{modality}_name": name})
        _write_json(folder / modality / f"{modality}.json", rows)
        media.append((folder / modality / FOLDERS[modality], media_set))
    return media


def _pair_caption(
    obj: WorldObject, modality: Modality, known: frozenset[str], rng: np.random.Generator
) -> str:
    """Sample a caption, mostly a canonical one, as in the answers of later stages."""
    if rng.random() < _CANONICAL_PAIRS:
        return canonical_caption(obj, modality, known, name_object=rng.random() < 0.5)
    return sample_caption(obj, modality, rng, known)


def _write_instructions(
    folder: Path, seed: int, counts: dict[str, int], unnamed_colours: float
) -> _MediaFolders:
    sizes = {name: {m: counts[f"{name}_{m}"] for m in MODALITIES} for name in ("question", "mosit")}
    questions = MediaSet("mini_question", seed, sizes["question"], unnamed_colours=unnamed_colours)
    dialogues = MediaSet("mini_mosit", seed, sizes["mosit"])
    question_folder = folder / "T+X-T_data" / "mini_question"
    dialogue_folder = folder / "MosIT_data" / "mini_mosit"
    for path, rows in {
        question_folder / "mini_question.json": _question_rows(questions, seed, counts["question"]),
        folder / "T-T+X_data" / "mini_request" / "mini_request.json": [
            row for row, _ in sample_requests(seed, counts["request"], counts["text_unsupported"])
        ],
        dialogue_folder / "mini_mosit.json": _dialogue_rows(dialogues, seed, counts),
        folder / "text" / "mini_text.json": _text_rows(
            seed, counts["text_world"], counts["text_plain"], counts["text_unsupported"]
        ),
    }.items():
        _write_json(path, rows)
    return [(question_folder, questions), (dialogue_folder, dialogues)]


def _question_rows(media_set: MediaSet, seed: int, count: int) -> Rows:
    """Build instruction rows: a medium and a question, answered in text."""
    rng = seeded_rng(seed, "questions")
    rows = []
    for _ in range(count):
        modality = choose(rng, _QUESTION_MODALITIES)
        name, obj = media_set.sample(modality, rng)
        known = media_set.visible_attributes(name, modality)
        question, answer = sample_question(
            obj, modality, rng, known, describe_proportion=_DESCRIBE_PROPORTION[modality]
        )
        turns = _turns(question, answer, input_modality=modality)
        rows.append({f"{modality}_name": name, "conversation": turns})
    return rows


def sample_requests(
    seed: int, count: int, unsupported: int
) -> Iterator[tuple[dict[str, Any], WorldObject]]:
    """Yield instruction rows: a text request for one image, video or sound, and its object.

    Args:
        count: rows without unsupported requests.
        unsupported: unsupported requests in the world, for each of which there are two more rows,
            one of them in the wordings of unsupported requests.
    """
    rng, media_set = seeded_rng(seed, "requests"), MediaSet("mini_request", seed, {})
    sampler = DialogueSampler(rng)
    for index in range(count + _FULFILLED_PER_UNSUPPORTED * unsupported):
        wanted: Modality = choose(rng, tuple(MODALITIES))
        alike = index >= count and index % _FULFILLED_PER_UNSUPPORTED == 0
        template = supported_template(wanted, rng) if alike else None
        exchange = sampler.opening(wanted, template=template)
        text, (modality, caption) = exchange.answer
        turns = _turns(exchange.request, text, output_modality=modality, caption=caption)
        name = media_set.answer_name(modality, caption)
        yield {"mm_name": name, "conversation": turns}, exchange.state.obj


def _dialogue_rows(media_set: MediaSet, seed: int, counts: dict[str, int]) -> Rows:
    """Build in-place dialogues of one to four rounds; first exchanges rotate through all cells."""
    rng = seeded_rng(seed, "dialogues")
    unsupported = _UNSUPPORTED_EDITS if counts["text_unsupported"] else 0
    sampler = DialogueSampler(rng, unsupported_edits=unsupported)
    rows = []
    for index in range(counts["mosit"]):
        source, goal = _CELLS[index % len(_CELLS)]
        rounds = int(rng.choice(4, p=(0.3, 0.35, 0.2, 0.15))) + 1
        rows.append({"conversation": sampler.dialogue(source, goal, rounds, media_set)})
    return rows


def _text_rows(seed: int, world: int, plain: int, unsupported: int) -> Rows:
    """Build text-only instruction rows: about the world's sounds, plain talk, declined requests.

    Args:
        world: questions about sounds, besides the facts.
        plain: rows of plain talk; repeated if there are fewer.
        unsupported: requests for media of what the world does not have.
    """
    rng = seeded_rng(seed, "texts")
    pairs = world_facts() + [sample_world_question(sample_object(rng), rng) for _ in range(world)]
    pairs = list(dict(pairs).items())
    pairs += itertools.islice(itertools.cycle(plain_talk_pairs(rng)), plain)
    pairs += [sample_unsupported(rng) for _ in range(unsupported)]
    return [{"conversation": _turns(*pairs[index])} for index in rng.permutation(len(pairs))]


def _turns(
    question: str,
    answer: str,
    input_modality: str = "text",
    output_modality: str = "text",
    caption: str = "",
) -> Rows:
    """One round in the course's instruction format."""
    return [
        {"from": "human", "value": question, "input_modality": input_modality},
        {"from": "gpt", "value": answer, "caption": caption, "output_modality": output_modality},
    ]


def _render(media: _MediaFolders, seed: int, progress: bool) -> None:
    jobs = [(folder, media_set, *medium) for folder, media_set in media for medium in media_set]
    for folder, _ in media:
        folder.mkdir(parents=True, exist_ok=True)

    def render(job: tuple[Path, MediaSet, str, Modality, WorldObject]) -> None:
        folder, media_set, name, modality, obj = job
        write_medium(folder / name, modality, obj, seed, media_set.appearance(name))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rendered = pool.map(render, jobs)
        for _ in tqdm(rendered, "rendering", len(jobs), unit="file", disable=not progress):
            pass


def write_examples(folder: Path, seed: int) -> None:
    """Write one input for each of the course's four cases, with its medium."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = seeded_rng(seed, "examples")
    outputs = {"T": "text", "I": "image", "V": "video", "A": "audio"}
    cases = []
    for number, (name, source) in enumerate(CASE_INPUT.items(), start=1):
        obj = sample_object(rng)
        media: dict[str, str | None] = dict.fromkeys(MODALITIES)
        if source is not None:
            file = f"mini_example_{source}_{number:06d}{MODALITIES[source].suffix}"
            write_medium(folder / file, source, obj, seed)
            media[source] = file
        requested = choose(rng, attribute_variants(obj, "colour"))
        text = as_sentence(fill_template(COURSE_REQUESTS[name].sample(rng), None, requested))
        expects = [outputs[letter] for letter in name.split("→")[1].split("+")]
        cases.append({"name": name, "text": text, **media, "expects": expects})
    _write_json(folder / "cases.json", cases)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the arguments and write the datasets."""
    parser = argparse.ArgumentParser(description="write the mini world in the course's layout")
    parser.add_argument("--out", type=Path, default=project_path("data/mini_world"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all row counts")
    parser.add_argument(
        "--unnamed_colours",
        type=float,
        default=_UNNAMED_COLOURS,
        help="proportion of images and videos in unnamed colours",
    )
    parser.add_argument(
        "--plain_talk",
        type=int,
        default=ROW_COUNTS["text_plain"],
        help="rows of plain talk at scale 1",
    )
    parser.add_argument(
        "--unsupported",
        type=int,
        default=ROW_COUNTS["text_unsupported"],
        help="rows of requests for what the mini world does not have, at scale 1",
    )
    write_world(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_cli(main)
