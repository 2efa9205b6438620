"""Published instruction sets and caption pairs load as downloaded, whatever generation they are of.

Each group of files is read through the row index, made into batches, its caption embeddings are
computed, and it is validated and trained on.
"""

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nextgpt import check_data
from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES
from nextgpt.conversation.messages import ContentPart, Conversation, Media, Text, Turn
from nextgpt.dataset.caption_embeddings import read_captions
from nextgpt.dataset.catalog import CATALOG, DatasetSource, resolve_entry
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.dataset.interleaved_forms import (
    DROPPED_TAGS,
    KEPT_INPUTS,
    MISSING_INPUTS,
    read_tagged,
)
from nextgpt.dataset.left_out import UnusableRow
from nextgpt.dataset.readers import FORMS, iter_captions, read_record
from nextgpt.dataset.record_fields import RowContext
from nextgpt.tools.embed_captions import embed_captions
from nextgpt.tools.validate_data import check_datasets
from test_training import media as pair_media
from tiny_components import write_tiny_delta
from tiny_decoders import tiny_decoder
from tiny_run import TinyRun, tiny_world
from tiny_system import tiny_encoder

CPU = torch.device("cpu")
FILE = Path("some.json")
SUFFIXES = {"image": ".jpg", "video": ".mp4", "audio": ".wav"}
Rows = list[tuple[dict, Conversation]]


def rounds(*sides: ContentPart | str | Iterable[ContentPart | str]) -> Conversation:
    """Turns of human and assistant; strings are texts."""
    turns = []
    for index, side in enumerate(sides):
        parts = [side] if isinstance(side, str | Media) else side
        texts = (Text(part) if isinstance(part, str) else part for part in parts)
        turns.append(Turn(("human", "assistant")[index % 2], tuple(texts)))
    return Conversation(tuple(turns))


def shown(name: str) -> Media:
    """An input medium; its modality follows from the suffix."""
    return Media(modality_of(name), path=name)


def made(name: str, caption: str) -> Media:
    """An output medium."""
    return Media(modality_of(name), caption=caption, embedding=f"{name}.npy")


def modality_of(name: str) -> str:
    return next(modality for modality, suffix in SUFFIXES.items() if name.endswith(suffix))


def turns(*values: str, **fields: str) -> list[dict]:
    """Turns in the published layout; `fields` are those of the gpt turns."""
    roles = ({"from": "human"}, {"from": "gpt", **fields})
    return [roles[index % 2] | {"value": value} for index, value in enumerate(values)]


def legacy_t2x(name: str) -> Rows:
    record = {"mm_name": name, "conversation": turns("Draw it", "Here.", caption="A (red) Ball")}
    record["conversation"][0]["input_modality"] = "text"
    record["conversation"][1]["output_modality"] = modality_of(name)
    return [(record, rounds("Draw it", ["Here.", made(name, "A (red) Ball")]))]


def later_t2x(modality: str) -> Rows:
    rows = []
    for row, caption in enumerate(("a ball", "a dog\r\n")):
        source = {"caption": caption}
        conversation = turns("Make it", "Sure!", caption=caption, output_modality=modality)
        name = {"image": f"it_img_{row}.jpg", "video": f"it_vid_{row}.mp4"}.get(modality)
        if modality == "audio":
            source["audiocap_id"], name = 3470 + row, f"{3470 + row}.wav"
        record = {"conversation": conversation, "source_data": source}
        rows.append((record, rounds("Make it", ["Sure!", made(name, caption)])))
    return rows


def later_lists(modality: str) -> Rows:
    name = f"34706{SUFFIXES[modality]}"
    record = {
        "id": 7,
        f"{modality}_captions": ["A bell\r\n"],
        f"{modality}_caption_embeddings": [f"{name}.npy"],
        "conversations": turns(
            "Ring", f"Listen: <{modality}>", caption="A bell\r\n", output_modality=modality
        ),
        "source_data": {"audiocap_id": 1},
    }
    return [(record, rounds("Ring", ["Listen:", made(name, "A bell\r\n")]))]


MOSIT_LEGACY: Rows = [
    (
        {
            "image_list": [
                {"image_name": "i_0.jpg", "data_source": "web", "caption": "a cat"},
                {"image_name": "i_1.jpg", "data_source": "web", "caption": "a dog"},
            ],
            "video_list": [{"video_name": "v_0.mp4", "caption": "a cat runs"}],
            "audio_list": [],
            "conversation": turns(
                "<Image>seen.jpg</Image> Who is it?",
                "A cat <Image>i_0.jpg</Image> or <Image>i_1.jpg</Image>, moving:"
                "<Video>v_0.mp4</Video>",
                "And <Image>lost.jpg</Image>?",
                "<image>a drawing of a cat</image>Again <Audio>none.wav</Audio>, the same "
                "<Image>i_0.jpg</Image>",
            ),
        },
        rounds(
            [shown("seen.jpg"), "Who is it?"],
            [
                "A cat",
                made("i_0.jpg", "a cat"),
                "or",
                made("i_1.jpg", "a dog"),
                ", moving:",
                made("v_0.mp4", "a cat runs"),
            ],
            "And?",
            ["Again, the same", made("i_0.jpg", "a cat")],
        ),
    )
]
MOSIT_LATER: Rows = [
    (
        {
            "image_captions": ["a cat", "a dog"],
            "image_caption_embeddings": ["c_0.jpg.npy", "c_1.jpg.npy"],
            "audio_captions": ["a purr"],
            "audio_caption_embeddings": ["c_0.wav.npy"],
            "conversations": turns(
                "A cat", "<image> purrs <audio> here", "A dog", "Look at\n<image>"
            ),
        },
        rounds(
            "A cat",
            [made("c_0.jpg", "a cat"), "purrs", made("c_0.wav", "a purr"), "here"],
            "A dog",
            ["Look at", made("c_1.jpg", "a dog")],
        ),
    )
]
MOSIT_OWN: Rows = [
    (
        {
            "conversation": [
                {
                    "from": "human",
                    "value": "<image>\nWho?",
                    "media": [{"modality": "image", "name": "seen.jpg"}],
                },
                {
                    "from": "gpt",
                    "value": "She: <audio>",
                    "media": [{"modality": "audio", "name": "o.wav", "caption": "a purr"}],
                },
            ]
        },
        rounds([shown("seen.jpg"), "Who?"], ["She:", made("o.wav", "a purr")]),
    )
]
LLAVA_LISTS: Rows = [
    (
        {
            "input_image": ["seen.jpg", "seen.jpg"],
            "conversations": turns("<image>\nWhat?", "A cat.", "Its colour?\n<image>", "White."),
        },
        rounds(
            [shown("seen.jpg"), "What?"], "A cat.", ["Its colour?", shown("seen.jpg")], "White."
        ),
    )
]
PRETRAINING: Rows = [
    (
        {"id": "1", "image": "seen.jpg", "conversations": turns("<image>\nName it", "a cat")},
        rounds([shown("seen.jpg"), "Name it"], "a cat"),
    ),
    (
        {
            "id": 2,
            "image_name": "sub/seen.jpg",
            "caption": "a cat",
            "conversations": turns("Name it\n<image>", "a cat"),
        },
        rounds(["Name it", shown("sub/seen.jpg")], "a cat"),
    ),
]
ALPACA: Rows = [({"conversations": turns("Add 3 < 5", "8")}, rounds("Add 3 < 5", "8"))]
ALPACA_RAW: Rows = [
    ({"instruction": "Add.", "input": "3 < 5", "output": "8"}, rounds("Add.\n3 < 5", "8")),
    (
        {"instruction": "Greet.", "input": "", "output": "Hi <image>"},
        rounds("Greet.", "Hi <image>"),
    ),
]
VIDEOCHAT_RAW: Rows = [
    (
        {
            "video": "seen.mp4",
            "QA": [{"i": "Look.", "q": "Who?", "a": "A man."}, {"q": "Where?", "a": "Home."}],
        },
        rounds([shown("seen.mp4"), "Look.\nWho?"], "A man.", "Where?", "Home."),
    )
]


def pairs_in(modality: str) -> Rows:
    name = f"seen{SUFFIXES[modality]}"
    record = {f"input_{modality}": name, "conversations": turns(f"<{modality}>\nIt?", "a ball")}
    return [(record, rounds([shown(name), "It?"], "a ball"))]


def pairs_out(modality: str) -> Rows:
    name = f"000{SUFFIXES[modality]}"
    record = {
        "id": 3,
        f"output_{modality}": name,
        f"{modality}_captions": "A ball\r\n",
        f"{modality}_caption_embeddings": f"{name}.npy",
        "conversations": turns("Show a ball", f"Sure! <{modality}>"),
    }
    return [(record, rounds("Show a ball", ["Sure!", made(name, "A ball\r\n")]))]


# By group the stage, and by data set the file in its folder and the rows.
GROUPS: dict[str, tuple[int, dict[str, tuple[str, Rows]]]] = {
    "legacy": (
        3,
        {
            "image_instruction": ("image_t2x.json", legacy_t2x("a.jpg")),
            "video_instruction": ("video_instruction.json", legacy_t2x("a.mp4")),
            "audio_instruction": ("audio_t2x.json", legacy_t2x("a.wav")),
            "mosit_instruction": ("mosit.json", MOSIT_LEGACY),
            "llava_instruction": ("preprocessed_llava.json", LLAVA_LISTS),
            "alpaca_instruction": ("preprocessed_alpaca.json", ALPACA),
        },
    ),
    "later": (
        3,
        {
            "image_instruction": ("image_t2x.json", later_t2x("image")),
            "video_instruction": ("video_t2x.json", later_t2x("video")),
            "audio_instruction": ("audio_t2x.json", later_t2x("audio")),
            "mosit_instruction": ("mosit_instruction_tuning.json", MOSIT_LATER),
            "llava_instruction": ("blip_laion_cc_sbu_558k.json", PRETRAINING),
            "alpaca_instruction": ("alpaca_data.json", ALPACA_RAW),
        },
    ),
    "lists": (
        3,
        {
            **{
                f"{m}_instruction": (f"{m}_instruction_tuning.json", later_lists(m))
                for m in MODALITIES
            },
            "mosit_instruction": ("mosit.json", MOSIT_OWN),
            "llava_instruction": ("llava_instruct_150k.json", PRETRAINING[:1]),
            "videochat_instruction": ("videochat_instruct_11k.json", VIDEOCHAT_RAW),
        },
    ),
    "comprehension": (
        1,
        {
            "cc3m_enc": ("blip_laion_cc_sbu_558k.json", PRETRAINING),
            "webvid_enc": ("webvid_comprehension.json", pairs_in("video")),
            "audiocap_enc": ("audiocap_comprehension.json", pairs_in("audio")),
        },
    ),
    "generation": (
        2,
        {
            "cc3m_dec": ("cc3m_generation.json", pairs_out("image")),
            "webvid_dec": ("webvid_generation.json", pairs_out("video")),
            "audiocap_dec": ("audiocap_generation.json", pairs_out("audio")),
        },
    ),
}


def write_set(data: Path, name: str, file: str, records: list[dict]) -> Path:
    """Write a data set's annotation file, and the media `seen` to its media folder."""
    annotation = data / Path(CATALOG[name].annotation).with_name(file)
    folder = data / CATALOG[name].media
    for inner in (annotation.parent, folder / "sub"):
        inner.mkdir(parents=True, exist_ok=True)
    annotation.write_text(json.dumps(records))
    for modality, suffix in SUFFIXES.items():
        for target in (folder, folder / "sub"):
            shutil.copy(pair_media(tiny_world() / "data", modality)[0], target / f"seen{suffix}")
    return annotation


def resolved(conversation: Conversation, media: Path, embeddings: Path) -> Conversation:
    """The conversation with absolute paths."""

    def resolve(part: ContentPart) -> ContentPart:
        if isinstance(part, Text):
            return part
        if part.embedding:
            return replace(part, embedding=str(embeddings / part.embedding))
        return replace(part, path=str(media / part.path))

    return Conversation(
        tuple(Turn(turn.role, tuple(map(resolve, turn.parts))) for turn in conversation.turns)
    )


@pytest.mark.parametrize("group", GROUPS)
def test_published_files_are_read_embedded_validated_and_trained_on(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, sets = GROUPS[group]
    data, embed, cache = (tmp_path / folder for folder in ("data", "embed", "cache"))
    files = {
        name: write_set(data, name, file, [record for record, _ in rows])
        for name, (file, rows) in sets.items()
    }
    dataset = ConversationDataset([resolve_entry(name, data, embed) for name in sets], cache)
    prompts = tiny_encoder()
    captions: dict[str, dict[str, str]] = {modality: {} for modality in MODALITIES}
    for name, (_, rows) in sets.items():
        assert dataset.sources[name].annotation == files[name]
        for row, (_, expected) in enumerate(rows):
            read = dataset[name, row]
            assert read == resolved(expected, dataset.sources[name].media, embed)
            found, wanted = prompts.encode(read), prompts.encode(expected)
            assert (found.input_ids, found.labels) == (wanted.input_ids, wanted.labels)
            for medium in expected.outputs:
                of_file = captions[medium.modality].setdefault(str(files[name]), {})
                of_file[medium.embedding.removesuffix(".npy")] = medium.caption
    for modality, by_file in captions.items():
        for file in by_file:
            embed_captions(Path(file), modality, embed, str(tiny_decoder(modality)), device=CPU)
        wanted = {name: caption for found in by_file.values() for name, caption in found.items()}
        assert read_captions(embed, modality) == wanted
        assert all((embed / f"{name}.npy").is_file() for name in wanted)

    run = TinyRun(
        tmp_path / "run",
        stage,
        [
            f"data.data_dir={data}",
            f"data.cache_dir={cache}",
            f"data.caption_embedding_dir={embed}",
            f"data.datasets=[{', '.join(sets)}]",
            "data.batching=round_robin",
            "training.global_batch_size=1",
            "training.micro_batch_size=1",
            f"training.max_steps={len(sets)}",
        ],
    )
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["check_data.py", *run.arguments])
    with pytest.raises(SystemExit) as ended:
        check_data.main()
    assert ended.value.code == 0
    output = capsys.readouterr().out
    for name, (_, rows) in sets.items():
        assert f"{name}: {len(rows)} of {len(rows)} usable" in output
    if group == "legacy":
        for note, count in ((DROPPED_TAGS, 2), (KEPT_INPUTS, 1), (MISSING_INPUTS, 1)):
            assert f"{count} {note}" in output
    if stage > 1:
        write_tiny_delta(tmp_path / "delta.safetensors")
        run.flags = ["--init-from", str(tmp_path / "delta.safetensors")]
    run.finish()
    assert len(run.losses) == len(sets) and all(0 < loss < 1e4 for loss in run.losses)
    assert run.metrics[-1]["skipped"] == 0


ALL_ROWS = {
    f"{group}-{name}-{row}": (record, expected)
    for group, (stage, sets) in GROUPS.items()
    if stage == 3
    for name, (_, rows) in sets.items()
    for row, (record, expected) in enumerate(rows)
}


@pytest.mark.parametrize("kind", ["instruction", "interleaved"])
@pytest.mark.parametrize("case", ALL_ROWS)
def test_instruction_forms_are_recognised_under_any_kind(
    case: str, kind: str, tmp_path: Path
) -> None:
    record, expected = ALL_ROWS[case]
    (tmp_path / "seen.jpg").touch()
    row = int(case.rpartition("-")[2])
    assert read_record(record, kind, FILE, row, tmp_path) == expected


@pytest.mark.parametrize(
    ("kind", "record", "named"),
    [
        ("instruction", {"prompt": "a", "conversation_list": []}, "fields: prompt, conversation_"),
        ("caption_in", {"image_name": "1.png", "text": "a"}, "nearest form is caption pair"),
        ("caption_in", {"image_names": "1.png", "caption": "a"}, "nearest form is caption pair"),
        ("instruction", {"image_name": "1.png", "caption": "a"}, "has the form caption pair"),
        ("caption_out", pairs_in("image")[0][0], "conversations with inputs.*caption_out does not"),
        ("caption_in", pairs_out("image")[0][0], "conversations with outputs.*caption_in does not"),
        ("caption_in", {"conversation": turns("a", "b")}, "has the form instruction"),
    ],
)
def test_unknown_forms_are_errors_that_name_fields_and_form(
    kind: str, record: dict, named: str
) -> None:
    with pytest.raises(UserError, match=rf"some\.json: row 3 .*{named}") as raised:
        read_record(record, kind, FILE, 3)
    assert not isinstance(raised.value, UnusableRow)


def test_every_form_is_covered() -> None:
    rows = [row for _, sets in GROUPS.values() for _, rows in sets.values() for row in rows]
    records = [{"caption": "a", "image_name": "1.png"}, *(record for record, _ in rows)]
    found = {next(form.name for form in FORMS if form.matches(record)) for record in records}
    assert found == {form.name for form in FORMS}


def test_several_annotation_files_are_read_in_the_documented_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("image_instruction_tuning.json", "image_t2x.json"):
        write_set(tmp_path, "image_instruction", file, [])
    assert (
        resolve_entry("image_instruction", tmp_path, tmp_path).annotation.name == "image_t2x.json"
    )
    assert (
        "image_t2x.json is read, and not image_instruction_tuning.json" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"caption": "a \ud83d b", "image_name": "1.png"}, "half a surrogate pair"),
        ({"caption": "a", "image_name": "\ud83d.png"}, "half a surrogate pair"),
        ({"caption": None, "image_name": "1.png"}, "caption empty"),
        ({"caption": " ", "image_name": "1.png"}, "caption empty"),
        ({"caption": "(*)", "image_name": "1.png"}, "caption of signs only"),
        ({"caption": ["a"], "image_name": "1.png"}, "caption wrong"),
        ({"caption": "a", "image_name": None}, "no file name"),
        ({"caption": "a", "image_name": "https://host/1.png"}, "URL as file name"),
        ({"caption": "a", "image_name": "b\\1.png"}, "Windows separators in a file name"),
        ({"caption": "a", "image_name": "/tmp/1.png"}, "file outside the media folder"),
        ({"caption": "a", "image_name": "b/../../1.png"}, "file outside the media folder"),
        ({"caption": "a", "image_name": "1" * 252}, "file name too long"),
        ({"caption": "a", "image_name": "b/" + "ü" * 128}, "file name too long"),
    ],
)
def test_unusable_rows_are_left_out_by_cause_up_to_5_percent(
    record: dict, cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"caption": f"thing {i}", "image_name": f"{i}.png"} for i in range(39)]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps([rows[0], record, *rows[1:]]))
    source = DatasetSource("pairs", "caption_out", file, tmp_path, tmp_path)
    dataset = ConversationDataset([source], tmp_path / "cache")
    assert dataset.sizes == {"pairs": 39}
    assert [dataset.file_row("pairs", row) for row in (0, 1, 38)] == [0, 2, 39]
    assert dataset["pairs", 1].outputs[0].caption == "thing 1"
    output = capsys.readouterr().out
    assert f"left out 1 ({cause}), first: {file}: row 1 (the first is 0)" in output
    # The media folder is unknown there, so that any absolute name may lie in it.
    embedded = 40 if str(record["image_name"]).startswith("/") else 39
    assert len(list(iter_captions(file, "image"))) == embedded
    (finding,) = check_datasets(dataset, None, {}, decode=0)
    assert "39 of 40 usable" in str(finding) and f"left out 1 ({cause})" in str(finding)
    file.write_text(json.dumps([*rows[:18], record]))
    with pytest.raises(UserError, match=rf"row 18 .*1 of the 19 rows .* 5%: 1 {cause}"):
        ConversationDataset([source], tmp_path / "cache")


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 3000 + "]" * 3000])
def test_values_beyond_the_parser_name_file_and_row(value: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(f'[{{"caption": "a", "image_name": "1.png"}}, {{"caption": {value}}}]')
    with pytest.raises(UserError, match=r"pairs\.json: row 1 .*cannot be read"):
        list(iter_captions(file, "image"))


def test_absolute_names_inside_the_media_folder_are_made_relative(tmp_path: Path) -> None:
    record = {"caption": "a", "image_name": str(tmp_path / "b/1.png")}
    read = read_record(record, "caption_in", FILE, 0, tmp_path)
    assert read.turns[0].parts[0] == Media("image", path="b/1.png")


def test_long_file_names_are_embedded_up_to_the_file_systems_limit(tmp_path: Path) -> None:
    rows = [{"caption": f"thing {n}", "image_name": f"b/{'x' * n}"} for n in (244, 251)]
    rows.append({"caption": "umlauts", "image_name": "ü" * 125})
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(rows))
    assert (
        embed_captions(file, "image", tmp_path / "out", str(tiny_decoder("image")), device=CPU) == 3
    )
    assert (tmp_path / "out" / f"{'x' * 251}.npy").is_file()


def test_row_without_its_listed_media_is_unusable() -> None:
    lists = later_lists("audio")[0][0]
    for record, cause in (
        ({"conversations": turns("<image> What?", "A cat.")}, "placeholder without a medium"),
        (lists | {"audio_captions": []}, "captions and names differ in number"),
        (lists | {"conversations": turns("Ring", "No.")}, "medium without a placeholder"),
    ):
        with pytest.raises(UnusableRow) as raised:
            read_record(record, "instruction", FILE, 0)
        assert raised.value.cause == cause


def test_unclosed_tags_are_read_in_linear_time() -> None:
    turn = {"from": "human", "value": "<Image>a " * 100_000 + "<image>lost.jpg</Image> b"}
    context = RowContext(0)
    (found,) = read_tagged({"conversation": [turn]}, context)  # minutes, if quadratic
    assert found.parts == (Text("a" * 100_000 + " b"),)
    assert context.notes == {DROPPED_TAGS: 100_001}
