"""The mini world's texts and files: captions are parsed back, held-out data does not leak."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from judge_files import judge_file
from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.messages import Media
from nextgpt.dataset.readers import read_record
from nextgpt.dataset.record_fields import clean_caption
from nextgpt.mini_world import questions, request_templates
from nextgpt.mini_world.captions import (
    CAPTION_TEMPLATES,
    audible_attributes,
    parse_caption,
    sample_caption,
)
from nextgpt.mini_world.dialogues import CASE_INPUT, OUTPUTS, DialogueSampler, DialogueState
from nextgpt.mini_world.media_set import MediaSet, render_medium
from nextgpt.mini_world.objects import (
    ATTRIBUTES,
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    TIMBRE_OF,
    VALUES,
    sample_object,
)
from nextgpt.mini_world.plain_talk import plain_talk_pairs
from nextgpt.mini_world.render_answers import render_answers
from nextgpt.mini_world.scoreboard.judge import judge
from nextgpt.mini_world.unsupported_requests import sample_unsupported
from nextgpt.mini_world.words import TemplateSet, fill_template
from nextgpt.mini_world.write_data import FOLDERS, write_world

SCALE = 0.1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world, written once."""
    out = tmp_path_factory.mktemp("data") / "mini_world"
    write_world(out, seed=3, scale=SCALE, progress=False)
    return out


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rows(world: Path, file: str) -> list[dict]:
    return json.loads((world / file).read_text(encoding="utf-8"))


def texts(value: object) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


# Objects


def test_held_out_pairs_leave_every_shape_and_colour_in_training() -> None:
    seen = [sample_object(rng(seed)) for seed in range(600)]
    assert {obj.split for obj in seen} == {"training"}
    for name in ("shape", "colour", "size", "place", "motion", "count"):
        assert {getattr(obj, name) for obj in seen} == set(VALUES[name])
    assert len({(obj.shape, obj.colour) for obj in seen}) == 48 - 16
    for split, pairs in HELD_OUT_PAIRS.items():
        assert len(pairs) == 8
        assert {shape for shape, _ in pairs} == set(SHAPES)
        assert {colour for _, colour in pairs} == set(COLOURS)
        assert {sample_object(rng(seed), split).split for seed in range(50)} == {split}
    assert not HELD_OUT_PAIRS["validation"] & HELD_OUT_PAIRS["test"]


# Captions and their parser


@pytest.mark.parametrize("modality", MODALITIES)
def test_parse_caption_returns_all_attributes(modality: Modality) -> None:
    wording = CAPTION_TEMPLATES[modality]
    for template in wording.training + wording.validation + wording.test:
        for seed in range(60):
            obj = sample_object(rng(seed), ("training", "validation", "test")[seed % 3])
            text = fill_template(template, rng(seed), obj)
            for written in (text, clean_caption(text)):
                parsed = parse_caption(written)
                parsed = audible_attributes(parsed) if modality == "audio" else parsed
                assert parsed == obj.attributes(modality), written
            assert len(text.split()) <= 20


def test_parse_caption_partial_returns_known_attributes_only() -> None:
    for seed in range(40):
        obj = sample_object(rng(seed))
        for modality in ("image", "video"):
            for named in ({"shape", "size"}, {"shape", "colour", "place"}):
                parsed = parse_caption(sample_caption(obj, modality, rng(seed), named))
                assert parsed == {name: getattr(obj, name) for name in named}


def test_parse_caption_accepts_answers() -> None:
    asked = {"maker": ("size", "shape"), "sound": ("pitch", "timbre"), "describe": ()}
    for modality, topics in questions.TOPICS.items():
        for topic in topics:
            for seed in range(20):
                obj = sample_object(rng(seed))
                _, answer = questions.sample_question(obj, modality, rng(seed), topic=topic)
                for name in asked.get(topic, (topic,)):
                    assert parse_caption(answer)[name] == getattr(obj, name), answer


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("It moves to the left.", {"motion": "moves left"}),
        ("On the left.", {"place": "left"}),
        ("A red circle that is blue", {"shape": "circle"}),
        ("It is getting bigger!", {"motion": "grows"}),
        ("a Bell rings 3 times", {"timbre": "bell", "count": 3}),
        ("Hello! How can I help you?", {}),
        ("", {}),
    ],
)
def test_parse_caption_handles_synonyms_and_contradictions(text: str, parsed: dict) -> None:
    assert parse_caption(text) == parsed


# Datasets


def test_rows_are_readable_and_their_media_exist(world: Path) -> None:
    files = {
        "IT_data/T+X-T_data/mini_question/mini_question.json": "instruction",
        "IT_data/T-T+X_data/mini_request/mini_request.json": "instruction",
        "IT_data/MosIT_data/mini_mosit/mini_mosit.json": "interleaved",
        "IT_data/text/mini_text.json": "instruction",
    }
    shown: dict[str, set[str]] = {}
    for file, kind in files.items():
        for number, row in enumerate(rows(world, file)):
            for turn in read_record(row, kind, world / file, number).turns:
                for part in turn.parts:
                    if isinstance(part, Media) and part.path:
                        assert (world / file).with_name(part.path).is_file()
                        shown.setdefault(file, set()).add(part.modality)
    assert set(shown) == {file for file in files if "question" in file or "mosit" in file}
    for modality, folder in FOLDERS.items():
        pairs = world / "T-X_pair_data" / modality
        for row in rows(pairs, f"{modality}.json"):
            assert set(row) == {"caption", f"{modality}_name"}
            assert (pairs / folder / row[f"{modality}_name"]).is_file()


def test_file_names_are_unique_and_answers_have_one_caption(world: Path) -> None:
    files = [path.name for path in world.rglob("*.*") if path.suffix != ".json"]
    captions: dict[str, str] = {}
    for row in rows(world, "IT_data/MosIT_data/mini_mosit/mini_mosit.json"):
        for turn in row["conversation"]:
            for medium in turn["media"] if turn["from"] == "gpt" else ():
                assert captions.setdefault(medium["name"], medium["caption"]) == medium["caption"]
    for row in rows(world, "IT_data/T-T+X_data/mini_request/mini_request.json"):
        text = row["conversation"][1]["caption"]
        assert captions.setdefault(row["mm_name"], text) == text
    assert len(files) == len(set(files)) and not set(files) & set(captions)


def test_pair_captions_name_the_media_attributes(world: Path) -> None:
    pairs = world / "T-X_pair_data"
    unnamed, total = [], 0
    for modality in MODALITIES:
        for row in rows(pairs / modality, f"{modality}.json"):
            parsed = parse_caption(row["caption"])
            parsed = audible_attributes(parsed) if modality == "audio" else parsed
            shown = set(ATTRIBUTES[modality])
            if modality != "audio" and "colour" not in parsed:
                shown -= {"colour"}
                unnamed.append(row[f"{modality}_name"])
            assert set(parsed) == shown
        total += len(rows(pairs / modality, f"{modality}.json")) if modality != "audio" else 0
    assert 0.05 < len(unnamed) / total < 0.5


def test_training_files_hold_no_held_out_pair_or_template(world: Path) -> None:
    places = [CAPTION_TEMPLATES, questions.TOPICS, vars(questions), vars(request_templates)]
    templates = {
        text for place in places for w in template_sets(place) for text in w.validation + w.test
    }
    held_out_pairs = HELD_OUT_PAIRS["validation"] | HELD_OUT_PAIRS["test"]
    assert len(templates) > 40
    patterns = [
        re.compile(r"\w[\w ,-]*".join(map(re.escape, re.split(r"{\w+}", text))) + "$", re.I)
        for text in templates
    ]
    files = [*world.glob("*_data/**/*.json")]
    assert len(files) == len(MODALITIES) + 4
    for file in files:
        for text in set(texts(rows(world, str(file.relative_to(world))))):
            parsed = parse_caption(text)
            assert (parsed.get("shape"), parsed.get("colour")) not in held_out_pairs, text
            bare = re.sub(r"\s*<\w+>\s*", "", text)
            assert not any(pattern.match(bare) for pattern in patterns), text


def test_training_media_are_never_judged_as_held_out_pairs(world: Path) -> None:
    held_out_pairs = HELD_OUT_PAIRS["validation"] | HELD_OUT_PAIRS["test"]
    paths = [*world.glob("*_data/**/*.png")][:100] + [*world.glob("*_data/**/*.mp4")][:50]
    assert len(paths) == 150
    judged = 0
    for path in paths:
        seen = judge_file("image" if path.suffix == ".png" else "video", path)
        assert (seen["shape"], seen["colour"]) not in held_out_pairs, path
        judged += None not in (seen["shape"], seen["colour"])
    assert judged > 75, judged


def template_sets(value: object) -> Iterator[TemplateSet]:
    """All template sets within dictionaries, tuples and topics."""
    if isinstance(value, TemplateSet):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from template_sets(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from template_sets(item)
    elif isinstance(value, questions.Topic):
        yield value.questions


def test_dialogues_open_with_all_cells_and_cases(world: Path) -> None:
    cells = set()
    for row in rows(world, "IT_data/MosIT_data/mini_mosit/mini_mosit.json"):
        human, gpt = row["conversation"][:2]
        source = [medium["modality"] for medium in human["media"]] or ["text"]
        cells.add((*source, "→", *[medium["modality"] for medium in gpt["media"]]))
        assert 1 <= len(row["conversation"]) / 2 <= 4
    for source in ("text", *MODALITIES):
        assert (source, "→") in cells
        assert {(source, "→", modality) for modality in MODALITIES} <= cells
    assert ("image", "→", "image", "video") in cells
    assert ("text", "→", "image", "video", "audio") in cells


def test_dialogues_later_answers_show_the_requested_edit() -> None:
    media_set = MediaSet("test", 0, dict.fromkeys(MODALITIES, 12))
    for seed in range(150):
        turns = DialogueSampler(rng(seed)).dialogue("image", "image", 2, media_set)
        asked = parse_caption(turns[0]["value"])
        shown = parse_caption(turns[0]["media"][0]["caption"])
        assert parse_caption(turns[1]["media"][0]["caption"]) == shown | asked


def test_dialogues_describe_audio_as_requested() -> None:
    seen = set()
    for seed in range(40):
        made = DialogueSampler(rng(seed)).opening("audio")
        asked, parsed = parse_caption(made.request), parse_caption(made.answer[0])
        assert ("shape" in asked) == ("shape" in parsed) != ("timbre" in parsed)
        seen.add("shape" in parsed)
        state = DialogueState.after_input(made.state.obj, "image")
        later = DialogueSampler(rng(seed)).follow_up(state, "audio")
        assert "shape" in parse_caption(later.answer[0])
        state = DialogueState.after_input(made.state.obj, "audio")
        later = DialogueSampler(rng(seed)).follow_up(state, "audio")
        assert "timbre" in parse_caption(later.answer[0])
    assert seen == {True, False}


def test_dialogues_held_out_exist_for_every_cell_and_case() -> None:
    media_set = MediaSet("test", 0, dict.fromkeys(MODALITIES, 12), split="validation")
    cells = [(source, goal) for source in (None, *MODALITIES) for goal in OUTPUTS]
    for source, goal in [*cells, *((source, case) for case, source in CASE_INPUT.items())]:
        for seed in range(10):
            sampler = DialogueSampler(rng(seed), "validation", ("training", "validation"))
            assert len(sampler.dialogue(source, goal, 3, media_set)) == 6


def test_examples_hold_the_four_cases_with_their_media(world: Path) -> None:
    cases = rows(world, "examples/cases.json")
    assert [case["name"] for case in cases] == list(CASE_INPUT)
    for case in cases:
        assert case["text"] and case["expects"][0] == "text"
        for modality in MODALITIES:
            assert (case[modality] is not None) == (modality == CASE_INPUT[case["name"]])
            assert case[modality] is None or (world / "examples" / case[modality]).is_file()


def test_plain_talk_has_hundreds_of_unique_questions() -> None:
    pairs = plain_talk_pairs(rng())
    assert len({question for question, _ in pairs}) == len(pairs) >= 250
    assert pairs == plain_talk_pairs(rng())
    for question, answer in pairs:
        assert answer.strip() == answer != "", question


def test_unsupported_requests_ask_for_what_the_world_does_not_have() -> None:
    nouns = {"draw": SHAPES, "film": SHAPES, "play": TIMBRE_OF.values()}
    modalities: dict[str, Modality] = {"draw": "image", "film": "video", "play": "audio"}
    generator = rng()
    for _ in range(2000):
        request, answer = sample_unsupported(generator)
        verb = re.match(r"I cannot (draw|film|play) ", answer)[1]
        named = parse_caption(request)
        assert named.keys() != set(ATTRIBUTES[modalities[verb]]), request
        assert all(noun in answer for noun in nouns[verb]) or named.keys() >= {"shape"}, answer
        assert request[-1] in ".?" and "{" not in request + answer


def test_unsupported_requests_are_written_as_text_and_as_edits_in_dialogues(tmp_path: Path) -> None:
    def declined(name: str) -> list[dict]:
        dialogues = rows(tmp_path / "world", f"IT_data/{name}.json")
        turns = [turn for dialogue in dialogues for turn in dialogue["conversation"][1::2]]
        return [turn for turn in turns if turn["value"].startswith("I cannot")]

    for count in (0, 300):
        write_world(tmp_path / "world", scale=0.1, unsupported=count, progress=False)
        edits = declined("MosIT_data/mini_mosit/mini_mosit")
        assert len(declined("text/mini_text")) == count / 10
        assert bool(edits) == bool(count) and not any(turn["media"] for turn in edits)
        requests = rows(tmp_path / "world", "IT_data/T-T+X_data/mini_request/mini_request.json")
        assert len(requests) == 70 + 2 * count / 10
        assert all(row["conversation"][1]["caption"] for row in requests)
    with pytest.raises(UserError, match=r"--unsupported -1: expected 0 or more"):
        write_world(tmp_path / "world", unsupported=-1, progress=False)


def test_write_data_is_deterministic_and_skipped_if_up_to_date(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    write_world(again, seed=3, scale=SCALE, progress=False)
    files = {path.relative_to(world): path.read_bytes() for path in world.rglob("*.*")}
    assert files == {path.relative_to(again): path.read_bytes() for path in again.rglob("*.*")}
    stamp = (again / "world.json").stat().st_mtime_ns
    write_world(again, seed=3, scale=SCALE, progress=False)
    assert (again / "world.json").stat().st_mtime_ns == stamp
    assert "already" in capsys.readouterr().out


def test_write_data_replaces_another_world_and_refuses_other_folders(
    tmp_path: Path,
) -> None:
    write_world(tmp_path / "world", seed=1, scale=0.01, progress=False)
    write_world(tmp_path / "world", seed=2, scale=0.01, progress=False)
    assert rows(tmp_path / "world", "world.json")["seed"] == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="no mini world"):
        write_world(tmp_path / "mine", progress=False)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep me"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_unnamed_colours_have_the_configured_proportion(tmp_path: Path) -> None:
    colours = {}
    for share in (0.0, 1.0):
        write_world(tmp_path / "world", scale=0.01, unnamed_colours=share, progress=False)
        pairs = rows(tmp_path / "world", "T-X_pair_data/image/image.json")
        colours[share] = {parse_caption(pair["caption"]).get("colour") for pair in pairs}
    assert len(colours[0.0]) > 2 and None not in colours[0.0]
    assert colours[1.0] == {None}
    with pytest.raises(UserError, match=r"--unnamed_colours 1\.5: expected 0 to 1"):
        write_world(tmp_path / "world", unnamed_colours=1.5, progress=False)


def test_plain_talk_rows_are_written(tmp_path: Path) -> None:
    plain = {question for question, _ in plain_talk_pairs(rng())}
    for count in (100, 300):
        write_world(tmp_path / "world", scale=0.1, plain_talk=count, progress=False)
        texts = rows(tmp_path / "world", "IT_data/text/mini_text.json")
        asked = [text["conversation"][0]["value"] for text in texts]
        assert sum(question in plain for question in asked) == count / 10
    with pytest.raises(UserError, match=r"--plain_talk 0: expected 1 or more"):
        write_world(tmp_path / "world", plain_talk=0, progress=False)


def test_unnamed_colours_are_rendered_and_not_captioned() -> None:
    media_set = MediaSet("test", 0, dict.fromkeys(MODALITIES, 200), unnamed_colours=0.3)
    for modality in ("image", "video"):
        parsed = [
            media_set.visible_attributes(name, modality)
            for name, one, _ in media_set
            if one == modality
        ]
        assert 40 < sum("colour" not in named for named in parsed) < 80
    name, obj = next(one for one in media_set.inputs["image"] if media_set.appearance(one[0]).rgb)
    assert "colour" not in media_set.visible_attributes(name, "image")
    picture = np.asarray(
        render_medium(name, "image", obj, 0, media_set.appearance(name)), dtype=float
    )
    assert (np.linalg.norm(picture - media_set.appearance(name).rgb, axis=-1) < 20).sum() > 30
    assert judge("image", render_medium(name, "image", obj, 0))["colour"] == obj.colour


def test_answers_of_requests_are_rendered_as_their_captions(tmp_path: Path) -> None:
    write_world(tmp_path / "world", seed=3, scale=0.02, progress=False)
    count = render_answers(tmp_path / "world")
    folder = tmp_path / "world" / "IT_data" / "T-T+X_data" / "mini_request"
    records = json.loads((folder / "mini_request.json").read_text())
    assert count == len({record["mm_name"] for record in records}) > 8
    for record in records:
        _, answer = record["conversation"]
        modality, caption = answer["output_modality"], answer["caption"]
        found = judge_file(modality, folder / record["mm_name"])
        expected = parse_caption(caption)
        expected = audible_attributes(expected) if modality == "audio" else expected
        assert {name: found[name] for name in expected} == expected, caption
    (folder / "mini_request.json").write_text(json.dumps(records[1:]))
    with pytest.raises(UserError, match="write the world again"):
        render_answers(tmp_path / "world")
