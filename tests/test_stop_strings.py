"""Stop strings and chosen modalities: what ends an answer, and which of its media are decoded."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from nextgpt.common.errors import UserError
from nextgpt.conversation.messages import ContentPart, Conversation, Media, Text, Turn
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.events import MediumReady, TextDelta
from nextgpt.generation.sampling import TextStreamer
from nextgpt.generation.settings import GenerationSettings
from nextgpt.generation.stop_strings import StopStrings
from serving_harness import EVERYTHING, scripted_assistant
from tiny_system import tiny_encoder

ASKED = Conversation((Turn("human", (Text("all of it"),)),))
SURE, IMAGE, MUSIC = Text("Sure"), Media("image"), Text("the music")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Assistant]:
    """Answers: Sure, an image, a video, the music, a sound."""
    yield scripted_assistant(tmp_path_factory.mktemp("scripted"), EVERYTHING)


def settings(assistant: Assistant, **changes: object) -> GenerationSettings:
    return replace(GenerationSettings.from_config(assistant.config), **changes)


@pytest.mark.parametrize(
    ("strings", "kept"),
    [
        ((), (SURE, IMAGE, MUSIC)),
        (("none",), (SURE, IMAGE, MUSIC)),
        (("music",), (SURE, IMAGE, Text("the "))),
        (("music", "he"), (SURE, IMAGE, Text("t"))),
        (("the",), (SURE, IMAGE)),
        (("\n",), (SURE,)),
        (("e\nthe",), (Text("Sur"),)),
        (("Su",), ()),
    ],
)
def test_stop_strings_cut_text_and_media_behind_the_first(
    strings: tuple[str, ...], kept: tuple[ContentPart, ...]
) -> None:
    assert StopStrings(strings).cut((SURE, IMAGE, MUSIC)) == kept


def test_stop_strings_hold_back_what_may_become_one() -> None:
    stop = StopStrings(["END", "EE"])
    for text, settled in [("a E", "a "), ("a EN", "a "), ("a EN.", "a EN."), ("a EEN", "a ")]:
        assert stop.settled(text) == settled


def test_stop_strings_are_never_streamed() -> None:
    encoder, deltas = tiny_encoder(), list[str]()
    stream = TextStreamer(encoder, deltas.append, StopStrings(["the music"]))
    for token_id in encoder.tokenizer("Sure the music", add_special_tokens=False).input_ids:
        stream.put([token_id])
    stream.end()
    assert "".join(deltas) == "Sure "


def test_stop_strings_end_generation(scripted: Assistant) -> None:
    whole = scripted.chat(ASKED)
    events = list(scripted.stream(ASKED, settings=settings(scripted, stop=("music",))))
    answer = events[-1].answer
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == answer.text
    assert answer.turn.parts == (*whole.turn.parts[:3], Text("the "))
    assert len(answer.token_ids) < len(whole.token_ids)
    assert len(answer.outputs) == 2


def test_stop_strings_across_a_medium_drop_it(scripted: Assistant) -> None:
    answer = scripted.chat(ASKED, settings=settings(scripted, stop=("Sure\nthe",)))
    assert not answer.turn.parts and not answer.outputs


def test_stop_strings_must_not_be_empty(scripted: Assistant) -> None:
    with pytest.raises(UserError, match="stop: an empty string"):
        settings(scripted, stop=("",))


def test_media_of_other_modalities_are_not_decoded_and_keep_their_span(
    scripted: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scripted.chat(ASKED)
    monkeypatch.setattr(scripted, "_decoders", {"video": scripted.load_decoder("video")})
    monkeypatch.setattr(scripted, "load_decoder", lambda m: scripted._decoders[m])
    chosen = settings(scripted, modalities=frozenset({"video"}))
    events = list(scripted.stream(ASKED, settings=chosen))
    answer = events[-1].answer
    assert answer.turn == whole.turn and answer.token_ids == whole.token_ids
    assert [event.number for event in events if isinstance(event, MediumReady)] == [1]
    (video,) = answer.outputs
    assert (video.frames == whole.outputs[1].frames).all()  # the seed is that of its place
