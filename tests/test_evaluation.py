"""The scoreboard: items, scoring, and a run with tiny components."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from judge_files import judge_file
from nextgpt import evaluate as entry
from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.conversation.messages import Media, Text, Turn
from nextgpt.dataset.record_fields import clean_caption
from nextgpt.evaluation.caption_passing import decode_captions, written_caption
from nextgpt.evaluation.metrics import wilson_interval
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.events import Answer
from nextgpt.generation.settings import GenerationSettings
from nextgpt.mini_world.captions import audible_attributes, parse_caption
from nextgpt.mini_world.media_set import render_medium
from nextgpt.mini_world.objects import HELD_OUT_PAIRS, SHAPE_OF, SIZE_OF, Split, Value, WorldObject
from nextgpt.mini_world.plain_talk import plain_talk_pairs
from nextgpt.mini_world.request_templates import (
    AUDIO_REQUESTS,
    COUNTED_AUDIO_REQUESTS,
    COURSE_REQUESTS,
    EDIT_REQUESTS,
    OPENING_REQUESTS,
    REVERSE_REQUESTS,
    VISUAL_REQUESTS,
)
from nextgpt.mini_world.scoreboard import scoreboard
from nextgpt.mini_world.scoreboard.items import (
    CASES,
    CELLS,
    LETTERS,
    MATRIX,
    PLAIN,
    QUICK,
    SECOND,
    UNSUPPORTED,
    Expected,
    Item,
    build_items,
    parse_cells,
    write_media,
)
from nextgpt.mini_world.scoreboard.judge import judge
from nextgpt.mini_world.scoreboard.plain_talk import perplexity, plain_questions
from nextgpt.mini_world.scoreboard.report import format_table
from nextgpt.mini_world.scoreboard.samples import read_medium
from nextgpt.mini_world.scoreboard.scoreboard import EvaluationSettings, Scoreboard, measure
from nextgpt.mini_world.scoreboard.scoring import chance_level, score_answer, summarize
from nextgpt.mini_world.scoreboard.unsupported import summarize_unsupported, unsupported_requests
from nextgpt.mini_world.unsupported_requests import sample_unsupported
from nextgpt.mini_world.words import TemplateSet
from tiny_components import tiny_overrides, write_tiny_components


def request_of(item: Item) -> str:
    """The text of the last human turn."""
    return next(part.text for part in item.rounds[-1].parts if isinstance(part, Text))


def items_of(*cells: str, samples: int = 24, split: Split = "validation") -> list[Item]:
    return build_items(cells, samples, 3, Path("/media"), split)


# What is asked.


def test_parse_cells_accepts_any_form() -> None:
    assert parse_cells("T-I, A->V,T→T") == ("T→T", "T→I", "A→V")
    assert parse_cells("second,T+I-T+A,plain") == ("T+I→T+A", SECOND, PLAIN)
    assert parse_cells("quick") == QUICK
    assert parse_cells("quick,cases") == (*QUICK, *CASES)
    assert len(MATRIX) == 16 and len(CASES) == 4
    with pytest.raises(UserError, match="T→X"):
        parse_cells("T-I,T-X")


def test_items_are_deterministic_for_any_selection(tmp_path: Path) -> None:
    both = build_items(["I→V", SECOND], 6, 5, tmp_path)
    assert both == build_items(["I→V", SECOND], 6, 5, tmp_path)
    assert both[6:8] == build_items([SECOND], 2, 5, tmp_path)
    assert both != build_items(["I→V", SECOND], 6, 6, tmp_path)


def pairs_of(item: Item) -> set[tuple[Value, Value]]:
    """Return every (shape, colour) that the item shows or determines."""
    pairs = set()
    if item.shown and item.shown[0] != "audio":
        pairs.add((item.shown[1].shape, item.shown[1].colour))
    for one in item.expected:
        if one.kind in ("image", "video") and {"shape", "colour"} <= one.attributes.keys():
            pairs.add((one.attributes["shape"], one.attributes["colour"]))
    return pairs


@pytest.mark.parametrize("split", ["validation", "test"])
def test_items_hold_pairs_of_their_split_and_training_only(split: Split) -> None:
    other = HELD_OUT_PAIRS["test" if split == "validation" else "validation"]
    for item in items_of(*CELLS, samples=24, split=split):
        pairs = pairs_of(item)
        assert not pairs & other
        if item.cell != SECOND:  # whose pair may be in the first round alone
            assert item.held_out == bool(pairs & HELD_OUT_PAIRS[split])


def test_items_hold_held_out_pairs_in_every_second_coloured_item() -> None:
    without = ("T→T", "T→A", "A→T", "A→A")
    for cell in CELLS:
        held_out = [item.held_out for item in items_of(cell, samples=8)]
        if cell in without:
            assert not any(held_out)
        elif cell not in (PLAIN, UNSUPPORTED):
            assert held_out == [False, True] * 4, cell


@pytest.mark.parametrize("cell", ["I→I", "V→V", "T+I→T+I+V"])
def test_edit_items_request_a_change_in_both_halves(cell: str) -> None:
    changed = {False: set(), True: set()}
    for item in items_of(cell, samples=60):
        _, before, _ = item.shown
        for one in item.expected:
            new = {n for n, value in one.attributes.items() if getattr(before, n) != value}
            if one.kind in ("image", "video"):
                changed[item.held_out] |= new
                if cell == "T+I→T+I+V" and one.kind == "image":
                    assert new == {"colour"}
                elif cell != "T+I→T+I+V":
                    assert len(new) == 1
    assert changed[False] == changed[True]


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != PLAIN])
def test_expectations_equal_the_captions_attributes(cell: str) -> None:
    """The true caption names every expected attribute, and for images and videos no other."""
    for item in items_of(cell):
        kinds = [one.kind for one in item.expected]
        if cell != SECOND:
            goals = [LETTERS[letter] for letter in cell.split("→")[1].split("+")]
            assert kinds == goals
        for one in item.expected:
            parsed = parse_caption(one.caption)
            if one.describes_audio or one.kind == "audio":
                parsed = audible_attributes(parsed)
            assert one.attributes.items() <= parsed.items()
            if one.kind in ("image", "video"):
                assert parsed == one.attributes


@pytest.mark.parametrize("split", ["validation", "test"])
def test_requests_use_templates_of_their_split(split: Split) -> None:
    beginnings: set[str] = set()
    allowed: set[str] = set()
    wordings: list[TemplateSet] = [
        *OPENING_REQUESTS.values(),
        *VISUAL_REQUESTS.values(),
        *COURSE_REQUESTS.values(),
    ]
    wordings += [wording for edits in EDIT_REQUESTS.values() for wording in edits.values()]
    for wording in [*wordings, AUDIO_REQUESTS, COUNTED_AUDIO_REQUESTS, REVERSE_REQUESTS]:
        own = getattr(wording, split)
        others = {*wording.training, *wording.validation, *wording.test} - set(own)
        beginnings |= {template.split("{")[0].strip(" .?") for template in others}
        allowed |= {template.split("{")[0].strip(" .?") for template in own}
    beginnings = {b for b in beginnings if len(b.split()) > 2}
    for item in items_of(*CELLS, samples=12, split=split):
        request = request_of(item)
        began = [b for b in beginnings if request.startswith(b)]
        assert not began or any(request.startswith(a) for a in allowed if a), request


def test_expectations_include_audio_count_only_if_given() -> None:
    for item in items_of("I→A", "V→A", "T+I→T+A"):
        counted = any(word in request_of(item) for word in ("once", "twice", "time", "thrice"))
        assert ("count" in item.expected[-1].attributes) == counted
    for item in items_of("T→A", "A→A", "T→T+I+V+A"):
        assert "count" in item.expected[-1].attributes


def test_expectations_from_audio_have_no_colour() -> None:
    named = [set(item.expected[0].attributes) for item in items_of("A→I")]
    assert {"size", "shape"} in named and {"size", "shape", "colour", "place"} in named
    assert all({"size", "shape"} <= one for one in named)


def test_second_rounds_refer_to_the_first() -> None:
    items = items_of(SECOND)
    assert all(len(item.rounds) == 2 for item in items)
    assert {item.expected[0].kind for item in items} == {"text", "image", "video", "audio"}
    assert all(not isinstance(item.rounds[1].parts[0], Media) for item in items)


def test_item_media_show_the_items_attributes(tmp_path: Path) -> None:
    items = build_items(["I→T", "V→T", "A→T"], 2, 0, tmp_path)
    write_media(items, 0)
    for item in items:
        modality, obj, path = item.shown
        assert item.rounds[0].parts[0] == Media(modality, path=str(path))
        assert judge_file(modality, path) == obj.attributes(modality)


# How it is scored.

RED = Expected("image", {"size": "small", "colour": "red", "shape": "circle"}, "a small red circle")
HIGH = Expected("audio", {"pitch": "high", "timbre": "bell"}, "a high bell")
SEEN_RED = {"size": "small", "colour": "red", "shape": "circle", "place": "top"}


def test_score_requires_expected_media_and_attributes() -> None:
    assert score_answer([RED], "", [("image", SEEN_RED)]).right
    blue = score_answer([RED], "", [("image", SEEN_RED | {"colour": "blue"})])
    assert blue.modalities and not blue.right
    assert blue.attributes == {"image size": True, "image colour": False, "image shape": True}
    nothing = score_answer([RED], "", [("image", dict.fromkeys(SEEN_RED))])
    assert nothing.modalities and not any(nothing.attributes.values())


@pytest.mark.parametrize("kinds", [[], ["video"], ["image", "image"], ["image", "audio"]])
def test_score_other_modality_or_number_of_media_is_wrong(kinds: list) -> None:
    score = score_answer([RED], "a small red circle", [(kind, SEEN_RED) for kind in kinds])
    assert not score.modalities and not score.right


def test_score_text_accepts_synonyms_and_needs_no_media() -> None:
    wanted = [Expected("text", {"shape": "circle", "colour": "red"}, "")]
    assert score_answer(wanted, "It is a crimson disc, I think.", []).right
    assert not score_answer(wanted, "A red circle that is blue.", []).right
    assert not score_answer(wanted, "A red circle.", [("image", SEEN_RED)]).right
    heard = Expected("text", {"pitch": "high", "timbre": "bell"}, "")
    assert not score_answer([heard], "A small circle.", []).right
    assert score_answer([replace(heard, describes_audio=True)], "A small circle.", []).right


def test_score_requires_every_output() -> None:
    wanted = [Expected("text", {}, "here"), RED, HIGH]
    bell = ("audio", {"pitch": "high", "timbre": "bell", "count": None})
    assert score_answer(wanted, "Here:", [bell, ("image", SEEN_RED)]).right
    assert not score_answer(wanted, "Here:", [("image", SEEN_RED)]).modalities
    assert not score_answer(wanted, " ", [bell, ("image", SEEN_RED)]).right


def test_score_of_perfect_answers_is_right() -> None:
    """Parser, judge and expectation agree on captions and rendered media."""
    for item in items_of(*CELLS, samples=4):
        media = []
        for one in item.expected:
            if one.kind != "text":
                obj = object_with(one.attributes)
                media.append((one.kind, judge(one.kind, render_medium("x", one.kind, obj, 0))))
        words = " ".join(one.caption for one in item.expected if one.kind == "text")
        assert score_answer(item.expected, words, media).right, item


def object_with(attributes: dict) -> WorldObject:
    """Return an object with these attributes."""
    by_object = {"pitch": ("size", SIZE_OF), "timbre": ("shape", SHAPE_OF)}
    figures = {
        by_object[name][0] if name in by_object else name: (
            by_object[name][1][value] if name in by_object else value
        )
        for name, value in attributes.items()
    }
    return replace(WorldObject("star", "green", "small", "middle", "grows", 1), **figures)


def test_wilson_interval_equals_known_values() -> None:
    # Newcombe (Stat. Med. 17, 1998, p. 857), table I.
    known = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611),
             (1, 29): (0.0061, 0.1718)}  # fmt: skip
    for (right, count), interval in known.items():
        assert wilson_interval(right, count) == pytest.approx(interval, abs=1e-4)
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1), abs=1e-4)
    assert wilson_interval(0, 0) == (0, 1)


def test_chance_is_one_over_the_number_of_values() -> None:
    item = items_of("T→I", samples=1)[0]
    assert chance_level([item]) == pytest.approx(1 / (2 * 8 * 6 * 5))
    halves = [replace(item, expected=(replace(RED, attributes=a),)) for a in ({}, {"size": "big"})]
    assert chance_level(halves) == pytest.approx(0.75)


def test_summary_counts_pairs_separately() -> None:
    items = items_of("T→I", samples=4)
    right = score_answer([RED], "", [("image", SEEN_RED)])
    wrong = score_answer([RED], "", [("image", SEEN_RED | {"size": "big"})])
    summary = summarize(items, [right, wrong, right, right])
    assert (summary["n"], summary["right"], summary["modalities"]) == (4, 0.75, 1)
    assert summary["seen_pairs"]["right"] == 1 and summary["held_out_pairs"]["right"] == 0.5
    assert summary["attributes"] == {"image size": 0.75, "image colour": 1, "image shape": 1}


def test_report_leaves_pair_columns_empty_without_held_out_pairs() -> None:
    def row(*cells: str) -> str:
        items = items_of(*cells, samples=4)
        scores = [score_answer([RED], "", [("image", SEEN_RED)])] * 4
        return format_table({"X": summarize(items, scores)}, {}, {}, {}).splitlines()[-2]

    assert row("T→A").split()[4:6] == ["100", "2.8"]  # media, then chance
    assert row("T→I").split()[4:7] == ["100", "100", "100"]


def test_caption_before_medium_follows_the_colon() -> None:
    parts = (
        Text("A box. Here is the picture: a small red circle, on the left."),
        Media("image"),
        Media("video"),
        Text("You hear a bell."),
        Media("audio"),
    )
    assert written_caption(parts, "image") == "a small red circle, on the left"
    assert written_caption(parts, "video") == ""
    assert written_caption(parts, "audio") == "You hear a bell"
    assert written_caption((), "image") == ""


# A whole run.


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny components whose language model samples signal tokens."""
    folder = tmp_path_factory.mktemp("sampling")
    write_tiny_components(folder, favoured=range(38))
    return folder


def overrides_of(folder: Path) -> list[str]:
    return [*tiny_overrides(folder), "generation.max_new_tokens=30"]


def test_scoreboard_covers_every_cell_and_is_deterministic(
    tiny_folder: Path, tmp_path: Path
) -> None:
    config = load_config("7b", overrides=overrides_of(tiny_folder))
    assistant = Assistant.from_config(config, tiny_folder / "tuned" / "stage_3")
    cells = ("T→T", "T→I", "I→A", "A→V", "T→T+I+V+A", SECOND)
    boards = [measure(assistant, EvaluationSettings(cells, 2), tmp_path) for _ in "ab"]
    assert boards[0].cells == boards[1].cells
    assert set(boards[0].cells) == set(cells)
    for cell, figures in boards[0].cells.items():
        assert figures["n"] == 2 and figures["right"] in (0, 0.5, 1)
        if cell != SECOND:  # which sometimes generates
            for name in ("written", "ceiling", "passed"):
                assert (name in figures) == (cell != "T→T")
    printed = format_table(boards[0].cells, {}, {}, {"judge": 3.0})
    assert all(cell in printed for cell in cells)


def test_ceilings_are_decoded_from_verbatim_captions(tiny_folder: Path) -> None:
    config = load_config("7b", overrides=overrides_of(tiny_folder))
    assistant = Assistant.from_config(config, tiny_folder / "tuned" / "stage_3")
    options = GenerationSettings.from_config(config)
    decoder = assistant.load_decoder("audio")
    written = "A BELL (low): it rings twice"
    (found,) = decode_captions(assistant, "audio", [written], [3], options)
    embedded = decoder.text_encoder.encode([written])
    (wanted,) = decoder.decode(embedded, replace(options.decode["audio"], seed=(3,)))
    np.testing.assert_array_equal(found.samples, wanted.samples)
    assert not torch.equal(embedded, decoder.text_encoder.encode([clean_caption(written)]))


def evaluate_tiny(folder: Path, out: Path, cells: str, *arguments: str) -> None:
    """Evaluate the tiny components by the command line."""
    settings = [word for override in overrides_of(folder) for word in ("--set", override)]
    line = ["evaluate.py", "--config", "7b", *settings, "--samples", "2", "--seed", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*line, "--cells", cells, "--out", str(out), *arguments])
        run_cli(entry.main)


def samples_of(folder: Path) -> list[dict]:
    with (folder / "samples.jsonl").open(encoding="utf-8") as lines:
        return list(map(json.loads, lines))


def test_evaluate_continues_after_an_interruption_and_adds_cells(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_tiny(tiny_folder, tmp_path / "whole", "T-T,T-I,A-T")

    def interrupt(assistant: Assistant, settings: EvaluationSettings, folder: Path) -> Scoreboard:
        if settings.cells == ("T→I",):
            raise KeyboardInterrupt
        return measure(assistant, settings, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoreboard, "measure", interrupt)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            evaluate_tiny(tiny_folder, tmp_path / "parts", "T-T,T-I")
        assert len(samples_of(tmp_path / "parts")) == 2
        evaluate_tiny(tiny_folder, tmp_path / "parts", "T-T,A-T")  # T→I is not asked
    capsys.readouterr()
    evaluate_tiny(tiny_folder, tmp_path / "parts", "T-I")
    printed = capsys.readouterr().out
    assert "holds T→T, A→T already" in printed and "mean of the" not in printed
    whole, parts = (
        json.loads((tmp_path / name / "scoreboard.json").read_text()) for name in ("whole", "parts")
    )
    assert parts["cells"] == whole["cells"] and parts["seconds"].keys() == whole["seconds"].keys()
    assert samples_of(tmp_path / "parts") == samples_of(tmp_path / "whole")
    media = [sorted(p.name for p in (tmp_path / n / "media").iterdir()) for n in ("whole", "parts")]
    assert media[0] == media[1]


def test_evaluate_replaces_an_evaluation_of_something_else(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_tiny(tiny_folder, tmp_path, "T-I,I-I")
    guidance = ("--set", "decoders.image.guidance_scale=1", "--samples", "1")
    evaluate_tiny(tiny_folder, tmp_path, "T-I", *guidance)
    assert "another evaluation (decoding, samples), which is replaced" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "scoreboard.json").read_text())["cells"]) == ["T→I"]
    (sample,) = samples_of(tmp_path)
    files = {file for _, file in sample["media"]["made"]}
    assert {f"media/{file.name}" for file in (tmp_path / "media").iterdir()} == files
    (tmp_path / "scoreboard.json").write_text("[]")
    with pytest.raises(SystemExit):
        evaluate_tiny(tiny_folder, tmp_path, "T-I")
    assert "scoreboard.json is damaged" in capsys.readouterr().err


def test_evaluate_writes_json_and_plots(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_tiny(tiny_folder, tmp_path / "board", "T-T,I-I,A->V,T+V-T+A,second,plain,unsupported")
    written = json.loads((tmp_path / "board" / "scoreboard.json").read_text())
    assert (written["samples"], written["seed"]) == (2, 4)
    assert len(written["fingerprint"]) == 16 and written["delta"].endswith("delta.safetensors")
    samples = samples_of(tmp_path / "board")
    assert [one["doc_id"] for one in samples] == [
        2 * CELLS.index(cell) + number
        for cell in ("T→T", "I→I", "A→V", "T+V→T+A", SECOND)
        for number in range(2)
    ]
    for sample in samples:
        (response,) = sample["filtered_resps"]
        answer = json.loads(response) if response.startswith("{") else {"text": response}
        assert answer.pop("text") == sample["answers"][-1].strip()
        files = [file for several in answer.values() for file in several]
        assert sorted(files) == sorted(file for _, file in sample["media"]["made"])
        assert len(files) == len(sample["judged"])
        shown = sample["doc"]["shown"]
        assert [kind for kind, _ in sample["media"]["given"]] == ([shown[0]] if shown else []) or (
            sample["doc"]["cell"] == SECOND
        )
        for modality, file in sample["media"]["given"] + sample["media"]["made"]:
            read_medium(modality, tmp_path / "board" / file)
    assert set(written["cells"]) == {"T→T", "I→I", "A→V", "T+V→T+A", SECOND}
    assert written["plain"]["n"] == 100 and written["plain"]["ratio"] > 0
    unsupported = written["unsupported"]
    assert unsupported["n"] == 100 and unsupported["explained"] <= unsupported["right"]
    assert "language_model" in written["seconds"]
    for name in ("matrix.png", "contact_sheet.png"):
        picture = np.asarray(Image.open(tmp_path / "board" / name).convert("L"))
        assert picture.std() > 5
    assert "I→I" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--cells", "T-X"], "T→X"),
        (["--samples", "0"], "--samples 0"),
        (["--delta", "no"], "no tuned parameters at"),
    ],
)
def test_evaluate_bad_arguments_exit_with_a_message(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate.py", "--out", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as ended:
            run_cli(entry.main)
    assert ended.value.code == 2
    assert word in capsys.readouterr().err


def test_plain_questions_are_a_hundred_per_split_and_not_trained_on() -> None:
    trained = {question for question, _ in plain_talk_pairs(np.random.default_rng(0))}
    validation, test = (set(plain_questions(split)) for split in ("validation", "test"))
    assert len(validation) == len(test) == 100
    assert not validation & test and not (validation | test) & trained


def test_unsupported_requests_are_a_hundred_per_split_and_not_trained_on() -> None:
    validation, test = (set(unsupported_requests(split)) for split in ("validation", "test"))
    assert len(validation) == len(test) == 100 and not validation & test
    rng = np.random.default_rng(0)
    trained = {sample_unsupported(rng)[0] for _ in range(5000)}  # some would be among them
    assert not (validation | test) & trained


def test_unsupported_requests_count_media_and_what_the_answers_name() -> None:
    parts = (
        Text("I cannot draw a cat. I can draw circles, squares and rings."),
        Text("I like cats."),
        Media("image", caption="a red circle", embedding="a.npy"),
        Media("image", caption="a red circle", embedding="a.npy"),
    )
    answers = [Answer(Turn("assistant", (part,)), (), (), [], [], 0, {}) for part in parts]
    found = summarize_unsupported(["Draw a cat."] * 4, answers)
    assert (found["n"], found["right"], found["explained"]) == (4, 0.5, 0.25)


@torch.no_grad()
def test_perplexity_equals_the_models_loss(tiny_folder: Path) -> None:
    config = load_config("7b", overrides=overrides_of(tiny_folder))
    model = Assistant.from_config(config, tiny_folder / "tuned" / "stage_3").model.language_model
    prompts, answers = [[1, 5, 6], [1, 7]], [[8, 9, 10], [11, 12, 13, 14]]
    losses = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        losses += [float(model(input_ids=ids, labels=labels).loss)] * len(answer)
    assert perplexity(model, prompts, answers) == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
