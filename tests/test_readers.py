"""Every annotation format is read into conversations; errors name row and field."""

import json
from pathlib import Path

import pytest

from nextgpt.common.errors import UserError
from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.dataset.json_stream import iter_rows
from nextgpt.dataset.readers import Kind, iter_captions, read_record
from nextgpt.dataset.record_fields import clean_caption

FILE = Path("some.json")


def rounds(*sides: tuple) -> Conversation:
    roles = ("human", "assistant")
    return Conversation(tuple(Turn(roles[i % 2], side) for i, side in enumerate(sides)))


def test_caption_pair_to_caption_shows_the_medium_first() -> None:
    record = {"caption": 'A "Red" Circle; big', "image_name": "a/1.png"}
    assert read_record(record, "caption_in", FILE, 0) == rounds(
        (Media("image", path="a/1.png"), Text("generate a caption")),
        (Text("a red circle big"),),
    )


@pytest.mark.parametrize(
    ("caption", "read"),
    [
        ("A man (in red) runs; a dog: barks", "a man in red runs a dog barks"),
        ('"A" *big* #1~', "a big 1"),
        ("a\tb\nc", "a\tb\nc"),  # single ones stay what they are
        ("a \t b\r\n\r\nc", "a b c"),
        ("  Two dogs.\r\n", "two dogs."),
        ("a-b, c's 3.5", "a-b, c's 3.5"),
    ],
)
def test_clean_caption_equals_the_published(caption: str, read: str) -> None:
    assert clean_caption(caption) == read


def test_caption_pair_from_caption_ends_with_the_output_medium() -> None:
    """The answer's text is cleaned; the caption for the text encoder is verbatim."""
    record = {"caption": " Rain (heavy)  falls.\r\n", "audio_name": "sub/7.wav"}
    medium = Media("audio", caption=" Rain (heavy)  falls.\r\n", embedding="7.wav.npy")
    assert read_record(record, "caption_out", FILE, 0) == rounds(
        (Text("rain heavy falls."),), (Text("rain heavy falls."), medium)
    )


@pytest.mark.parametrize("value", ["What is it?\n<image>", "<image>\nWhat is it?"])
def test_later_release_input_replaces_the_placeholder(value: str) -> None:
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "A ring."}]
    read = read_record({"input_image": "1.png", "conversations": turns}, "caption_in", FILE, 0)
    parts = (Text("What is it?"), Media("image", path="1.png"))
    parts = parts if value.endswith("<image>") else parts[::-1]
    assert read == rounds(parts, (Text("A ring."),))


@pytest.mark.parametrize(
    ("record", "file"),
    [
        ({"caption": "rain", "audio_name": "sub/7.wav"}, "sub/7.wav"),
        ({"caption": "rain", "audio_name": "sub/7.wav", "embedding_name": "7.1"}, "sub/7.wav"),
        ({"caption": "rain", "audio_name": "http://a/7.wav", "embedding_name": "7.1"}, None),
        (
            {
                "audio_captions": ["rain"],
                "audio_caption_embeddings": ["7.wav.npy"],
                "conversations": [
                    {"from": "human", "value": "Let it rain"},
                    {"from": "gpt", "value": "<audio>"},
                ],
            },
            "7.wav",
        ),
    ],
)
def test_output_media_keep_the_name_of_their_file(record: dict, file: str | None) -> None:
    (medium,) = read_record(record, "caption_out", FILE, 0).outputs
    assert medium.target_path == file


def test_later_release_output_replaces_the_placeholder() -> None:
    record = {
        "output_video": "3.mp4",
        "video_captions": "A Kite",
        "video_caption_embeddings": "3.mp4.npy",
        "conversations": [
            {"from": "human", "value": "Show a kite"},
            {"from": "gpt", "value": "Sure! <video>"},
        ],
    }
    medium = Media("video", caption="A Kite", embedding="3.mp4.npy")
    expected = rounds((Text("Show a kite"),), (Text("Sure!"), medium))
    assert read_record(record, "caption_out", FILE, 0) == expected


def instruction(human: dict, gpt: dict, **names: str) -> dict:
    return {"conversation": [{"from": "human", **human}, {"from": "gpt", **gpt}], **names}


@pytest.mark.parametrize("field", ["image_name", "mm_name"])
def test_instruction_medium_precedes_the_first_text(field: str) -> None:
    record = instruction(
        {"value": "What shape?", "input_modality": "image"},
        {"value": "A star.", "caption": "", "output_modality": "text"},
        **{field: "1.png"},
    )
    more = [
        {"from": "human", "value": "And its colour?", "input_modality": "image"},
        {"from": "gpt", "value": "Blue.", "output_modality": "text"},
    ]
    record["conversation"] += more
    assert read_record(record, "instruction", FILE, 0) == rounds(
        (Media("image", path="1.png"), Text("What shape?")),
        (Text("A star."),),
        (Text("And its colour?"),),
        (Text("Blue."),),
    )


def test_instruction_output_follows_the_answer() -> None:
    record = instruction(
        {"value": "Ring a bell", "input_modality": "text"},
        {"value": "Here:", "caption": "A Bell", "output_modality": "audio"},
        mm_name="b.wav",
    )
    medium = Media("audio", caption="A Bell", embedding="b.wav.npy")
    assert read_record(record, "instruction", FILE, 0) == rounds(
        (Text("Ring a bell"),), (Text("Here:"), medium)
    )


@pytest.mark.parametrize("text", ["3 < 5 > 2", "<Image>/etc/passwd</Image>", "say <image> twice "])
def test_text_without_placeholders_is_verbatim(text: str) -> None:
    record = instruction({"value": text}, {"value": text})
    assert read_record(record, "instruction", FILE, 0) == rounds((Text(text),), (Text(text),))


MOSIT = {
    "conversation": [
        {
            "from": "human",
            "value": "Here: <image> what does it sound like if 3 < 5?",
            "media": [{"modality": "image", "name": "x.png", "caption": "a bell"}],
        },
        {
            "from": "gpt",
            "value": "<audio> and, seen:<video>",
            "media": [
                {"modality": "audio", "name": "x.wav", "caption": "Ding"},
                {"modality": "video", "name": "x.mp4", "caption": "a bell rings"},
            ],
        },
    ]
}


def test_mosit_accepts_any_number_of_media_on_both_sides() -> None:
    assert read_record(MOSIT, "interleaved", FILE, 0) == rounds(
        (
            Text("Here:"),
            Media("image", path="x.png"),
            Text("what does it sound like if 3 < 5?"),
        ),
        (
            Media("audio", caption="Ding", embedding="x.wav.npy"),
            Text("and, seen:"),
            Media("video", caption="a bell rings", embedding="x.mp4.npy"),
        ),
    )


HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi"}
PICTURE = {"modality": "image", "name": "x.png"}


@pytest.mark.parametrize(
    ("kind", "record", "named"),
    [
        ("caption_in", {"caption": "a"}, "image_name, video_name, audio_name"),
        ("caption_in", {"caption": None, "image_name": "1.png"}, "caption"),
        ("caption_in", {"caption": '"();', "image_name": "1.png"}, "caption"),
        ("caption_in", {"caption": "a", "image_name": "../1.png"}, "image_name"),
        ("caption_in", {"caption": "a", "image_name": "/etc/passwd"}, "image_name"),
        ("caption_out", {"output_video": "1.mp4", "conversations": [HUMAN, GPT]}, "video_captions"),
        ("caption_in", {"input_image": "1.png", "conversations": [HUMAN, GPT]}, "<image>"),
        (
            "caption_in",
            {"conversations": [{"from": "human", "value": "<image>"}, GPT]},
            "text conversations",
        ),
        ("instruction", {"conversation": []}, "alternation"),
        ("instruction", {"conversation": [HUMAN]}, "alternation"),
        ("instruction", {"conversation": [HUMAN, {"from": "bot", "value": ""}]}, r"\[1\].from"),
        ("instruction", {"conversation": [HUMAN, {"from": "gpt", "value": " "}]}, "empty"),
        ("instruction", {"conversation": [{"from": "human"}, GPT]}, r"\[0\].value"),
        (
            "instruction",
            instruction({"value": "a", "input_modality": "sound"}, GPT),
            "input_modality",
        ),
        ("instruction", instruction({"value": "a", "input_modality": "image"}, GPT), "mm_name"),
        ("instruction", instruction(HUMAN, GPT, mm_name="1.png"), "no turn says"),
        (
            "instruction",
            instruction(HUMAN, {**GPT, "output_modality": "image"}, mm_name="1.png"),
            r"\[1\].caption",
        ),
        (
            "instruction",
            instruction(
                {"value": "again", "input_modality": "image"},
                {**GPT, "output_modality": "image", "caption": "a"},
                mm_name="1.png",
            ),
            "second image",
        ),
        ("interleaved", {"conversation": [{**HUMAN, "value": "<image>"}, GPT]}, r"\[0\].value"),
        ("interleaved", {"conversation": [{**HUMAN, "media": [PICTURE]}, GPT]}, r"\[0\].value"),
        (
            "interleaved",
            {"conversation": [{**HUMAN, "value": "<video>", "media": [PICTURE]}, GPT]},
            r"\[0\].value",
        ),
        (
            "interleaved",
            {"conversation": [HUMAN, {**GPT, "value": "<image>", "media": [PICTURE]}]},
            r"\[1\].media\[0\].caption",
        ),
    ],
)
def test_reader_bad_record_names_row_and_field(kind: Kind, record: dict, named: str) -> None:
    with pytest.raises(UserError, match=rf"some\.json: row 41 .*{named}"):
        read_record(record, kind, FILE, 41)


def test_captions_of_output_media_are_found_in_every_format(tmp_path: Path) -> None:
    pairs = [{"caption": "A (B)", "image_name": "1.png"}, {"caption": "c", "image_name": "2.png"}]
    request = instruction(
        HUMAN, {**GPT, "output_modality": "audio", "caption": "D"}, mm_name="x.wav"
    )
    for name, rows, modality, expected in [
        ("pairs", pairs, "image", [("1.png", "A (B)"), ("2.png", "c")]),
        ("request", [request, instruction(HUMAN, GPT)], "audio", [("x.wav", "D")]),
        ("mosit", [MOSIT], "video", [("x.mp4", "a bell rings")]),
    ]:
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(rows))
        assert list(iter_captions(file, modality)) == expected
    with pytest.raises(UserError, match="no captions of video"):
        list(iter_captions(tmp_path / "pairs.json", "video"))


def test_json_stream_reads_rows_across_chunk_boundaries(tmp_path: Path) -> None:
    rows = [{"n": i, "text": 'ü\\"' * size} for i, size in enumerate([1, 900_000, 7, 400_000, 3])]
    rows += [{"x": -1.5e-7, "flags": [True, None], "pad": "y" * i} for i in range(3000)]
    for indent in (None, 2):
        file = tmp_path / "rows.json"
        file.write_text(json.dumps(rows, indent=indent, ensure_ascii=indent is None))
        read = list(iter_rows(file))
        assert [record for record, _ in read] == rows
        assert json.loads(read[1][1]) == rows[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 0: expected ["),
        ('{"a": 1}', "row 0: expected ["),
        ('[{"a": 1} {"a": 2}]', "row 0: expected , or ]"),
        ('[{"a": 1}, 5]', "row 1: expected {"),
        ('[{"a": 1}, {"a": tru}]', "row 1: Expecting value"),
        ('[{"a": 1},', "row 1: expected {, near the end"),
        ('[{"a": 1}', "row 0: expected , or ]"),
        ('[{"a": 1}] x', "more than one array"),
        ('[{"a": "b', "row 0: Unterminated"),
    ],
)
def test_json_stream_invalid_json_names_the_position(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"bad\.json") as raised:
        list(iter_rows(file))
    assert message in str(raised.value)


def test_json_stream_empty_array_has_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "empty.json"
    file.write_text(" [ ] ")
    assert list(iter_rows(file)) == []
