"""Generation with tiny components end to end: sampling, streaming and decoding."""

import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextgpt.common.errors import MediaError, UserError
from nextgpt.config.loader import load_config
from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.conversation.prompt import PromptBuilder
from nextgpt.decoders.pipelines import build_decoder
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.events import (
    Answer,
    AnswerComplete,
    Cancelled,
    DiffusionStep,
    MediumReady,
    TextDelta,
    TurnComplete,
    stream_events,
)
from nextgpt.generation.sampling import (
    CompleteSignalSpans,
    StopSequences,
    TextStreamer,
    join_texts,
    readable_parts,
)
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.writing import Frames, Sound
from nextgpt.model.build import build_prompt_builder
from parity_tools import MEDIA
from tiny_components import script_language_model, tiny_overrides, write_tiny_components
from tiny_system import tiny_encoder

SIGNALS = tiny_encoder().signals
PHOTO, BELL = str(MEDIA / "portrait.jpg"), str(MEDIA / "tone_16k.wav")


@pytest.fixture(scope="module")
def sampling_assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    """The recorded model with raised logits of all new tokens, valid starts or not."""
    folder = tmp_path_factory.mktemp("sampling")
    write_tiny_components(folder, favoured=range(38))
    config = load_config("7b", overrides=tiny_overrides(folder))
    return Assistant.from_config(config, folder / "tuned" / "stage_3")


def human_turn(*parts: Text | Media) -> Conversation:
    return Conversation((Turn("human", parts),))


def ask(
    assistant: Assistant, conversation: Conversation, seed: int = 0, **figures: float
) -> Answer:
    options = GenerationSettings.from_config(assistant.config)
    return assistant.chat(conversation, seed=seed, settings=replace(options, **figures))


def span_modalities(ids: list[int]) -> list[str]:
    """Return the modalities of the spans in `ids`; fail on an incomplete span."""
    found = []
    while ids:
        if not SIGNALS.first_id <= ids[0] < SIGNALS.end_id:
            ids = ids[1:]
            continue
        modality = SIGNALS.modality_starting_with(ids[0])
        assert modality is not None, SIGNALS.name(ids[0])
        run = SIGNALS.span(modality)
        assert ids[: len(run)] == run
        found.append(modality)
        ids = ids[len(run) :]
    return found


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1), (0.7, 0.9), (1, 1), (2, 1)])
def test_signal_spans_are_complete_for_any_sampling(
    sampling_assistant: Assistant, temperature: float, top_p: float
) -> None:
    figures = {"temperature": temperature, "top_p": top_p, "max_new_tokens": 30}
    made = 0
    for seed in range(4):
        answer = ask(
            sampling_assistant, human_turn(Text("draw, film and play it")), seed, **figures
        )
        modalities = span_modalities(answer.token_ids)
        media = [part for part in answer.turn.parts if isinstance(part, Media)]
        assert [medium.modality for medium in media] == modalities
        assert len(answer.outputs) == len(modalities)
        assert len(answer.token_ids) <= 30
        made += len(modalities)
    assert made


def test_signal_spans_start_only_where_they_fit() -> None:
    complete_spans = CompleteSignalSpans(SIGNALS, max_new_tokens=10)
    scores = torch.zeros(SIGNALS.end_id)
    starts = {modality: SIGNALS.span(modality)[0] for modality in SIGNALS.counts}

    def allowed(written: int) -> set[int]:
        masked = complete_spans.mask(scores, written)
        return set(masked.isfinite().nonzero().flatten().tolist())

    own = set(range(SIGNALS.first_id))
    assert allowed(0) == own | {starts["image"], starts["audio"]}
    assert allowed(3) == own | {starts["image"]}
    assert allowed(7) == own
    assert complete_spans.starting_with(starts["audio"]) == SIGNALS.span("audio")
    assert complete_spans.starting_with(starts["audio"] + 1) is None
    assert complete_spans.starting_with(5) is None


@pytest.mark.parametrize("written", [[13, 332], [333], [2]])
def test_stop_sequences_all_end_generation(written: list[int], tmp_path: Path) -> None:
    word = tiny_encoder().tokenizer("Sure", add_special_tokens=False).input_ids
    write_tiny_components(tmp_path)
    overrides = script_language_model(tmp_path, [*word, *written])
    config = load_config("7b", overrides=overrides)
    assistant = Assistant.from_config(config, tmp_path / "tuned" / "stage_3")
    answer = ask(assistant, human_turn(Text("hello")))
    assert answer.token_ids == [*word, *written]
    assert answer.turn.parts == (Text("Sure"),)


def test_stop_sequences_match_only_at_the_end() -> None:
    stops = StopSequences(tiny_encoder().stop_sequences)
    for ids, stops_here in [
        ([13], False),
        ([332], False),
        ([13, 332], True),
        ([13, 332, 5], False),
    ]:
        assert stops.ends(ids) is stops_here


def full_embeddings(
    assistant: Assistant, conversation: Conversation, answer: Answer
) -> tuple[int, torch.Tensor]:
    """Return the prompt's length L and the input embeddings (1, L + A, H) of prompt and answer."""
    encoded = assistant.prompt_builder.encode(conversation)
    (prompt,) = assistant.embed_prompts([encoded], {})
    written = torch.tensor([answer.token_ids])
    embed = assistant.model.language_model.get_input_embeddings()
    return len(prompt), torch.cat([prompt[None], embed(written)], dim=1)


def sampled(ids: list[int]) -> list[tuple[int, int]]:
    """Return number and id of the tokens that do not follow from the one before."""
    starts = {SIGNALS.span(modality)[0] for modality in SIGNALS.counts}
    return [(n, i) for n, i in enumerate(ids) if i < SIGNALS.first_id or i in starts]


@torch.no_grad()
def test_greedy_decoding_equals_the_uncached_forward_pass(sampling_assistant: Assistant) -> None:
    conversation = human_turn(Media("image", path=PHOTO), Text("what is it?"))
    answer = ask(sampling_assistant, conversation, temperature=0, max_new_tokens=20)
    prompt, embeddings = full_embeddings(sampling_assistant, conversation, answer)
    model, complete_spans = sampling_assistant.model, CompleteSignalSpans(SIGNALS, 20)
    hidden = model.last_hidden_states(embeddings)
    logits = model.language_model.get_output_embeddings()(hidden)[0, prompt - 1 :]
    for step, token_id in sampled(answer.token_ids):
        assert complete_spans.mask(logits[step], step).argmax() == token_id


@torch.no_grad()
@pytest.mark.parametrize(("top_k", "within"), [(50, True), (0, False)])
def test_top_k_sampling_is_limited_to_k_tokens(
    sampling_assistant: Assistant, top_k: int, within: bool
) -> None:
    assert GenerationSettings.from_config(sampling_assistant.config).top_k == 50
    conversation = human_turn(Text("surprise me"))
    answer = ask(
        sampling_assistant, conversation, top_k=top_k, top_p=1, temperature=2, max_new_tokens=30
    )
    prompt, embeddings = full_embeddings(sampling_assistant, conversation, answer)
    head, complete_spans = (
        sampling_assistant.model.language_model.get_output_embeddings(),
        CompleteSignalSpans(SIGNALS, 30),
    )
    logits = head(sampling_assistant.model.last_hidden_states(embeddings))[0, prompt - 1 :]
    ranks = []
    for step, token_id in sampled(answer.token_ids):
        scores = complete_spans.mask(logits[step], step)
        ranks.append(int((scores > scores[token_id]).sum()))
    assert (max(ranks) < 50) is within
    assert max(ranks) > 0


@torch.no_grad()
def test_media_are_decoded_from_projected_hidden_states(sampling_assistant: Assistant) -> None:
    conversation = human_turn(Media("image", path=PHOTO), Text("draw it"))
    answer = ask(sampling_assistant, conversation, seed=3, temperature=0, max_new_tokens=24)
    prompt, embeddings = full_embeddings(sampling_assistant, conversation, answer)
    model = sampling_assistant.model
    hidden = model.last_hidden_states(embeddings)
    starts = [(p, SIGNALS.modality_starting_with(i)) for p, i in enumerate(answer.token_ids)]
    starts = [(position, modality) for position, modality in starts if modality]
    assert starts
    for number, (position, modality) in enumerate(starts):
        run = torch.tensor([[0, prompt + position]])
        caption = model.project_signals(modality, run, hidden, embeddings)
        decoder = build_decoder(
            modality, sampling_assistant.config.decoders[modality].path, sampling_assistant.device
        )
        options = GenerationSettings.from_config(sampling_assistant.config).decode[modality]
        expected = decoder.decode(caption, replace(options, seed=3 + number))[0]
        for found, wanted in zip(pixels(answer.outputs[number]), pixels(expected), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4)


def pixels(output: object) -> list[np.ndarray]:
    array = output[0] if isinstance(output, Frames | Sound) else np.asarray(output)
    return list(array.astype(np.float64))


@pytest.mark.parametrize("seed", range(4))
def test_text_deltas_concatenate_to_the_answer(sampling_assistant: Assistant, seed: int) -> None:
    options = GenerationSettings.from_config(sampling_assistant.config)
    options = replace(options, top_k=0, top_p=1, temperature=2, max_new_tokens=40)
    *events, last = sampling_assistant.stream(
        human_turn(Text("tell me")), seed=seed, settings=options
    )
    streamed = [event.text for event in events if isinstance(event, TextDelta)]
    assert isinstance(last, AnswerComplete)
    assert "".join(streamed) == last.answer.text
    assert len(streamed) > 1


def test_events_are_ordered_and_hold_the_complete_answer(sampling_assistant: Assistant) -> None:
    settings = replace(
        GenerationSettings.from_config(sampling_assistant.config), max_new_tokens=24, top_p=1
    )
    conversation = human_turn(Text("draw, film and play it"))
    *events, last = sampling_assistant.stream(conversation, seed=3, settings=settings)
    full_embeddings = sampling_assistant.chat(conversation, seed=3, settings=settings)
    assert isinstance(last, AnswerComplete) and last.answer.token_ids == full_embeddings.token_ids
    kinds = [type(event) for event in events if not isinstance(event, TextDelta)]
    steps = [event for event in events if isinstance(event, DiffusionStep)]
    ready = [event for event in events if isinstance(event, MediumReady)]
    total = settings.decode["image"].num_inference_steps
    assert kinds == [TurnComplete, *([DiffusionStep] * total + [MediumReady]) * len(ready)]
    assert [event.step for event in steps] == [*range(1, total + 1)] * len(ready)
    assert sorted(event.number for event in ready) == [*range(len(full_embeddings.outputs))] != []
    for event, step in zip(ready, steps[::total], strict=True):
        assert event.number == step.number
        for found, wanted in zip(
            pixels(event.output), pixels(full_embeddings.outputs[event.number]), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("where", [TextDelta, TurnComplete, DiffusionStep])
@pytest.mark.parametrize("how", ["close", "raise"])
def test_generation_stops_when_the_consumer_stops(
    sampling_assistant: Assistant, where: type, how: str
) -> None:
    settings = GenerationSettings.from_config(sampling_assistant.config)
    slow = replace(settings.decode["image"], num_inference_steps=900)
    settings = replace(
        settings,
        max_new_tokens=24,
        top_p=1,
        decode=dict.fromkeys(settings.decode, replace(slow, height=None, width=None)),
    )
    before = threading.active_count()

    def consume() -> None:
        with closing(
            sampling_assistant.stream(human_turn(Text("draw it")), seed=3, settings=settings)
        ) as events:
            for event in events:
                if isinstance(event, where):
                    if how == "raise":
                        raise KeyError(where)
                    return
        pytest.fail("no such event")

    start = time.monotonic()
    with pytest.raises(KeyError) if how == "raise" else nullcontext():
        consume()
    assert time.monotonic() - start < 10
    assert threading.active_count() == before
    assert sampling_assistant.chat("draw", settings=replace(settings, max_new_tokens=2)).token_ids


def test_event_stream_cancels_its_producer_and_raises_its_errors() -> None:
    stops_here = []

    def generate(emit: Callable[[object], None]) -> None:
        try:
            while True:
                emit(TextDelta("a"))
        except Cancelled:
            stops_here.append(True)
            raise

    events = stream_events(generate)
    assert next(events) == TextDelta("a") and not stops_here
    events.close()
    assert stops_here

    def fail(emit: Callable[[object], None]) -> None:
        emit(TextDelta("b"))
        raise MediaError("broken")

    failing = stream_events(fail)
    assert next(failing) == TextDelta("b")
    with pytest.raises(MediaError, match="broken"):
        next(failing)


def test_ask_accepts_text_with_files(sampling_assistant: Assistant, tmp_path: Path) -> None:
    settings = replace(GenerationSettings.from_config(sampling_assistant.config), max_new_tokens=8)
    turn = human_turn(Media("image", path=PHOTO), Media("audio", path=BELL), Text("what is it?"))
    wanted = sampling_assistant.chat(turn, settings=settings)
    given = sampling_assistant.chat(
        "what is it?", image=PHOTO, audio=[Path(BELL)], settings=settings
    )
    assert given.token_ids == wanted.token_ids and given.prompt_tokens == wanted.prompt_tokens
    with pytest.raises(UserError, match=r"no such file.*gone\.png"):
        sampling_assistant.chat("what?", image=tmp_path / "gone.png")
    with pytest.raises(TypeError, match="picture"):
        sampling_assistant.chat("what?", picture=PHOTO)
    with pytest.raises(TypeError, match="conversation"):
        sampling_assistant.chat(turn, image=PHOTO)


def test_text_streamer_holds_back_stop_prefixes_and_partial_characters() -> None:
    encoder = tiny_encoder()
    deltas: list[str] = []
    stream = TextStreamer(encoder, deltas.append)
    smile = [encoder.tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in "☺".encode()]
    word = encoder.tokenizer("Sure", add_special_tokens=False).input_ids
    ids = [*word, *smile, *word, 13, 332]
    text_after = []
    for token_id in ids:
        stream.put([token_id])
        text_after.append("".join(deltas))
    stream.end()
    assert text_after[len(word) : len(word) + 3] == ["Sure"] * 3
    assert text_after[-2:] == ["Sure☺ Sure"] * 2
    assert "".join(deltas) == join_texts(readable_parts(encoder, ids)) == "Sure☺ Sure"


WRITTEN = (
    "Sure",
    " here",
    "你好",
    "，世界。",
    "☺",
    "👩‍👩‍👧",
    "𝄞",
    "é",
    "\n",
    "###",
    "\n#",
    " ",
    "3 < 5",
)


def random_answer(encoder: PromptBuilder, rng: random.Random) -> list[int]:
    """Return text of several scripts, incomplete bytes, signal spans, maybe a stop sequence."""
    tokenizer, ids = encoder.tokenizer, []
    for _ in range(rng.randint(1, 12)):
        kind = rng.random()
        if kind < 0.65:
            ids += tokenizer(rng.choice(WRITTEN), add_special_tokens=False).input_ids
        elif kind < 0.85:  # a token of the vocabulary, often one byte or a part of a character
            low = rng.randrange(300)
            ids += [low] if [low] not in encoder.stop_sequences else []
        else:
            ids += encoder.signals.span(rng.choice(list(encoder.signals.counts)))
    end = rng.choice([*encoder.stop_sequences, []])
    return ids + end[: rng.choice([len(end), 1])]


@pytest.mark.parametrize("config", ["tiny", "mini"])
def test_text_streamer_equals_the_decoded_text(config: str) -> None:
    """With sentencepiece and with byte-level BPE."""
    encoder = tiny_encoder() if config == "tiny" else build_prompt_builder(load_config("mini"))
    scripts = 0
    for seed in range(400):
        ids = random_answer(encoder, random.Random(seed))
        deltas: list[str] = []
        stream = TextStreamer(encoder, deltas.append)
        final = join_texts(readable_parts(encoder, ids))
        for token_id in ids:
            stream.put([token_id])
            assert final.startswith("".join(deltas)), seed
        stream.end()
        assert "".join(deltas) == final, seed
        assert all(deltas), seed
        scripts += not final.isascii()
    assert scripts > 200


def test_generation_depends_on_its_seed_and_keeps_global_random_state(
    sampling_assistant: Assistant,
) -> None:
    conversation = human_turn(Text("surprise me"))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    answers = [
        ask(sampling_assistant, conversation, seed, top_p=1, temperature=2, max_new_tokens=12)
        for seed in (1, 1, 2)
    ]
    torch.testing.assert_close(torch.rand(3), expected)
    assert answers[0].token_ids == answers[1].token_ids != answers[2].token_ids


def test_generation_uses_media_of_every_turn(sampling_assistant: Assistant) -> None:
    """The prompt holds the features of every user turn; an earlier answer's medium is a span."""
    turns = (
        Turn("human", (Media("image", path=PHOTO), Text("what is it?"))),
        Turn("assistant", (Text("a person"), Media("audio", path="/nowhere.wav"))),
        Turn("human", (Media("audio", path=BELL), Text("and this?"))),
    )
    encoded = sampling_assistant.prompt_builder.encode(Conversation(turns))
    (prompt,) = sampling_assistant.embed_prompts([encoded], {})
    photo, bell = (position for position, _ in encoded.media_positions)
    assert [m.modality for _, m in encoded.signal_spans] == ["audio"]
    assert not torch.allclose(prompt[photo], prompt[bell])
    other = (Media("image", path=str(MEDIA / "gray.png")), Text("what is it?"))
    changed = sampling_assistant.prompt_builder.encode(
        Conversation((replace(turns[0], parts=other), *turns[1:]))
    )
    (changed_prompt,) = sampling_assistant.embed_prompts([changed], {})
    differing = (changed_prompt != prompt).any(dim=-1).nonzero().flatten()
    assert differing.tolist() == [photo]


def test_feature_cache_is_valid_until_the_file_changes(
    sampling_assistant: Assistant, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(Path(PHOTO).read_bytes())
    encoded = sampling_assistant.prompt_builder.encode(
        human_turn(Media("image", path=str(picture)))
    )
    first, again = (sampling_assistant.embed_prompts([encoded], {})[0] for _ in range(2))
    assert torch.equal(first, again)
    black = np.zeros((30, 30, 3), np.uint8)
    Image.fromarray(black).save(picture)
    os.utime(picture, ns=(1, 1))
    dark = sampling_assistant.embed_prompts([encoded], {})[0]
    assert not torch.allclose(dark, first)
    picture.write_bytes(Path(PHOTO).read_bytes())
    os.utime(picture, ns=(1, 1))  # as programs that copy do
    assert torch.equal(sampling_assistant.embed_prompts([encoded], {})[0], first)
    with pytest.raises(MediaError, match="no such file"):
        ask(sampling_assistant, human_turn(Media("image", path=str(tmp_path / "none.png"))))


def together(assistant: Assistant, at_once: int = 16, **figures: float) -> list[list[Answer]]:
    """Answer the same conversations of several lengths one by one and in a batch."""
    turns = human_turn(
        Media("image", path=PHOTO), Text("what is it, and what did it sound like?")
    ).turns
    said = Turn("assistant", (Text("a person"), Media("audio", path="/nowhere.wav")))
    conversations = [
        human_turn(Text("draw")),
        Conversation(
            (*turns, said, *human_turn(Media("audio", path=BELL), Text("and this?")).turns)
        ),
        Conversation(turns),
        human_turn(Text("surprise me with all that you have")),
    ]
    seeds = (4, 9, 4, 2)
    options = replace(
        GenerationSettings.from_config(assistant.config), max_new_tokens=40, **figures
    )
    alone = [
        assistant.chat(conversation, seed=seed, settings=options)
        for conversation, seed in zip(conversations, seeds, strict=True)
    ]
    batch = assistant.answer(conversations, seeds=seeds, settings=options, media_at_once=at_once)
    return [alone, batch]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("at_once", [2, 16])
def test_batched_answers_equal_single_answers(
    sampling_assistant: Assistant, temperature: float, at_once: int
) -> None:
    alone, batch = together(sampling_assistant, at_once, temperature=temperature)
    assert [one.token_ids for one in batch] == [one.token_ids for one in alone]
    assert [one.turn for one in batch] == [one.turn for one in alone]
    assert len({tuple(one.token_ids) for one in batch}) == len(batch)
    assert sum(len(one.outputs) for one in batch) > 4
    for one, other in zip(batch, alone, strict=True):
        assert span_modalities(one.token_ids) == [
            p.modality for p in one.turn.parts if isinstance(p, Media)
        ]
        for found, wanted in zip(one.outputs, other.outputs, strict=True):
            for left, right in zip(pixels(found), pixels(wanted), strict=True):
                np.testing.assert_allclose(left, right, atol=1)


@pytest.mark.parametrize("temperature", [1, 2])
def test_batched_sampling_gives_the_same_ids(
    sampling_assistant: Assistant, temperature: float
) -> None:
    conversations = [
        human_turn(Text("draw")),
        human_turn(Media("image", path=PHOTO), Text("what is it, and what did it sound like?")),
        human_turn(Text("surprise me with all that you have")),
    ]
    options = GenerationSettings.from_config(sampling_assistant.config)
    options = replace(options, temperature=temperature, top_p=1.0, top_k=0, max_new_tokens=24)
    for seed in range(4):
        seeds = (seed, seed, seed + 1)
        alone = [
            sampling_assistant.chat(conversation, seed=own, settings=options).token_ids
            for conversation, own in zip(conversations, seeds, strict=True)
        ]
        batch = sampling_assistant.answer(
            conversations, seeds=seeds, settings=options, media_at_once=16
        )
        assert [answer.token_ids for answer in batch] == alone
        other = sampling_assistant.answer(
            conversations[::-1], seeds=seeds[::-1], settings=options, media_at_once=16
        )
        assert [answer.token_ids for answer in other[::-1]] == alone


def test_generation_refuses_prompts_beyond_the_context(sampling_assistant: Assistant) -> None:
    with pytest.raises(UserError, match=r"context length is 2048 .*clear the history"):
        ask(sampling_assistant, human_turn(Text("long " * 2000)))
