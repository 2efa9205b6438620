"""Continuous batching: requests join and leave, prompts in chunks, cancellation, failures."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from nextgpt.common.errors import MediaError
from nextgpt.config.loader import load_config
from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.generation import decoding
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.decoding import GeneratedSequence, TokenGenerator
from nextgpt.generation.engine import AnswerEngine, AnswerRequest
from nextgpt.generation.events import Cancelled, DiffusionStep, Event, MediumFailed, TextDelta
from nextgpt.generation.settings import GenerationSettings
from parity_tools import MEDIA
from tiny_components import tiny_overrides, write_tiny_components

PHOTO = str(MEDIA / "portrait.jpg")


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    folder = tmp_path_factory.mktemp("engine")
    write_tiny_components(folder, favoured=range(38))
    config = load_config("7b", overrides=tiny_overrides(folder))
    return Assistant.from_config(config, folder / "tuned" / "stage_3")


@pytest.fixture
def engine(assistant: Assistant) -> Iterator[AnswerEngine]:
    with closing(AnswerEngine(assistant, max_batch_size=4, media_batch_size=4)) as one:
        yield one


def request(
    assistant: Assistant, text: str, seed: int = 0, tokens: int = 30, **figures: object
) -> AnswerRequest:
    settings = replace(
        GenerationSettings.from_config(assistant.config), top_p=1.0, max_new_tokens=tokens
    )
    turn = Turn("human", (Media("image", path=PHOTO), Text(text)))
    return AnswerRequest(Conversation((turn,)), settings, seed, **figures)


def run(engine: AnswerEngine) -> None:
    while engine.busy:
        engine.step()


def test_clients_are_served_in_turns(assistant: Assistant) -> None:
    ended: list[str] = []
    with closing(AnswerEngine(assistant, max_batch_size=1)) as engine:
        for client in "aaaaabbc":
            end = partial(ended.append, client)
            engine.submit(request(assistant, "a", tokens=2, client=client, on_end=end))
        run(engine)
    assert "".join(ended) == "abcabaaa"


def test_requests_that_join_at_any_time_get_their_answers_alone(
    assistant: Assistant, engine: AnswerEngine
) -> None:
    requests = [request(assistant, f"number {n} " * (1 + 9 * n), seed=n) for n in range(7)]
    for one in requests:
        engine.submit(one)
        engine.step()
        engine.step()
    run(engine)
    made = 0
    for one in requests:
        alone = assistant.chat(one.conversation, seed=one.seed, settings=one.settings)
        assert one.answer and one.answer.token_ids == alone.token_ids
        assert one.answer.turn == alone.turn
        for found, wanted in zip(one.answer.prompt_embeds, alone.prompt_embeds, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        for found, wanted in zip(one.answer.outputs, alone.outputs, strict=True):
            assert type(found) is type(wanted)
            if not isinstance(found, tuple):
                found, wanted = np.asarray(found, float), np.asarray(wanted, float)
                np.testing.assert_allclose(found, wanted, atol=1)
        made += len(alone.outputs)
    assert made > 4
    assert len({tuple(one.answer.token_ids) for one in requests if one.answer}) == len(requests)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_chunks_of_a_prompt_give_the_uncached_hidden_states(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setitem(decoding._CHUNK, "cpu", chunk)
    model = assistant.model
    embeddings = torch.randn(40, model.language_model.config.hidden_size)
    generator = TokenGenerator(model.language_model, assistant.prompt_builder)
    sequences = [GeneratedSequence(embeddings[:n], 6) for n in (40, 11)]
    generator.active += sequences
    while generator.active:
        generator.step()
    embed = model.language_model.get_input_embeddings()
    for sequence, length in zip(sequences, (40, 11), strict=True):
        written = embed(torch.tensor([sequence.ids]))
        whole = torch.cat([embeddings[None, :length], written], dim=1)
        hidden = model.last_hidden_states(whole)
        logits = model.language_model.get_output_embeddings()(hidden)[0, length - 1 : -1]
        assert logits.argmax(-1).tolist() == sequence.ids
        states = torch.cat(sequence.states)
        torch.testing.assert_close(states, hidden[0, length : length + len(states)])


@torch.no_grad()
def test_sliding_window_attention_equals_the_uncached_pass(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    from nextgpt.model.cached_attention import (
        KeyValueCache,
        forward_segments,
        use_cached_attention,
    )

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=5,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    embeddings = torch.randn(20, 32)
    wanted = model.model(inputs_embeds=embeddings[None]).last_hidden_state[0]
    use_cached_attention(model)
    cache, found = KeyValueCache(), []
    for chunk in embeddings.split([3, 9, 1, 1, 6]):
        found += forward_segments(model, [(cache, chunk)])
    torch.testing.assert_close(torch.cat(found), wanted)


def test_short_prompt_does_not_wait_for_a_long_one(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(decoding._CHUNK, "cpu", 16)
    generator = TokenGenerator(assistant.model.language_model, assistant.prompt_builder)
    embeddings = torch.randn(400, assistant.model.language_model.config.hidden_size)
    long, short = GeneratedSequence(embeddings, 4), GeneratedSequence(embeddings[:10], 4)
    generator.active += [long, short]
    for _ in range(8):
        generator.step()
    assert short.complete and not long.ids and len(long.pending) < 400
    while generator.active:
        generator.step()
    assert len(long.ids) == 4


@pytest.mark.parametrize("stage", ["waiting", "prompt", "words", "media"])
def test_cancelled_request_leaves_at_the_next_step(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setitem(decoding._CHUNK, "cpu", 8)
    cancelled, ended = [], []

    def check() -> None:
        if cancelled:
            raise Cancelled

    def emit(event: Event) -> None:
        seen.append(event)
        if stage == "media" and isinstance(event, DiffusionStep):
            cancelled.append(1)

    seen: list[Event] = []
    figures = {"check": check, "emit": emit, "on_end": lambda: ended.append(1)}
    one = request(assistant, "long " * 300, seed=3, **figures)
    other = request(assistant, "and you?", seed=5)
    with closing(AnswerEngine(assistant, 2 if stage != "waiting" else 1, 1)) as engine:
        engine.submit(other)
        engine.submit(one)
        while not ended:
            if stage == "waiting" and other.sequence and other.sequence.ids:
                cancelled.append(1)
            if stage == "prompt" and one.sequence and one.sequence.cache.length:
                cancelled.append(1)
            if stage == "words" and any(isinstance(event, TextDelta) for event in seen):
                cancelled.append(1)
            was_cancelled = bool(cancelled)
            engine.step()
            assert not was_cancelled or ended == [1]
        assert isinstance(one.error, Cancelled) and one.answer is None
        if stage == "prompt":
            assert one.sequence and not one.sequence.ids
        assert other.answer is None or stage == "media"
        run(engine)
    alone = assistant.chat(other.conversation, seed=5, settings=other.settings)
    assert other.answer and other.answer.token_ids == alone.token_ids
    assert ended == [1]


def test_words_are_generated_while_media_are_denoised(assistant: Assistant) -> None:
    order: list[tuple[str, str]] = []
    first = request(assistant, "draw it", seed=3, tokens=24)
    second = request(assistant, "draw it", tokens=2)
    decode = first.settings.decode.items()
    slow = {modality: replace(one, num_inference_steps=20) for modality, one in decode}
    first.settings = replace(first.settings, decode=slow)
    with closing(AnswerEngine(assistant, 2, 1)) as engine:

        def emit_first(event: Event) -> None:
            if isinstance(event, DiffusionStep) and not second.admitted:
                engine.submit(second)
            order.append(("first", type(event).__name__))

        first.emit = emit_first
        second.emit = lambda event: order.append(("second", type(event).__name__))
        engine.submit(first)
        run(engine)
    steps = [n for n, event in enumerate(order) if event == ("first", "DiffusionStep")]
    assert steps[0] < order.index(("second", "AnswerComplete")) < steps[-1]
    assert order[-1] == ("first", "AnswerComplete")


def test_failing_request_leaves_the_others(assistant: Assistant, engine: AnswerEngine) -> None:
    def fail(event: Event) -> None:
        raise KeyError("nobody there")

    good = request(assistant, "tell me")
    lost = request(assistant, "tell me more", emit=fail)
    missing = Conversation((Turn("human", (Media("image", path="/gone.png"), Text("what?"))),))
    bad = replace(request(assistant, "a"), conversation=missing)
    for one in (lost, bad, good):
        engine.submit(one)
    run(engine)
    assert isinstance(lost.error, KeyError) and isinstance(bad.error, MediaError)
    assert good.answer and not good.error


def test_media_batch_that_fails_is_decoded_one_by_one(
    assistant: Assistant, engine: AnswerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders = [assistant.load_decoder(modality) for modality in assistant.config.decoders]
    sizes: list[int] = []
    for decoder in decoders:
        decode = decoder.decode

        def limited(embeds: torch.Tensor, *rest: object, decode=decode) -> list:  # noqa: ANN001
            sizes.append(len(embeds))
            if len(embeds) > 1:
                raise torch.OutOfMemoryError("too many")
            return decode(embeds, *rest)

        monkeypatch.setattr(decoder, "decode", limited)
    requests = [request(assistant, "draw it", seed=3) for _ in range(3)]
    for one in requests:
        engine.submit(one)
    run(engine)
    assert max(sizes) > 1
    assert all(one.answer and one.answer.outputs for one in requests)


@pytest.mark.parametrize("keeps_others", [False, True])
def test_medium_that_fails_ends_the_answer_unless_it_keeps_the_others(
    assistant: Assistant,
    engine: AnswerEngine,
    monkeypatch: pytest.MonkeyPatch,
    keeps_others: bool,
) -> None:
    seen: list[Event] = []
    alone = assistant.chat(request(assistant, "draw it", seed=3).conversation, seed=3)
    media = [part.modality for part in alone.turn.parts if isinstance(part, Media)]
    failing = next(modality for modality in media if media.count(modality) < len(media))
    decoder = assistant.load_decoder(failing)
    unet = decoder.pipeline.unet
    monkeypatch.setitem(unet._modules, "conv_in", torch.nn.Conv2d(3, 16, 3))
    one = request(assistant, "draw it", 3, emit=seen.append, keeps_other_media=keeps_others)
    one.settings = GenerationSettings.from_config(assistant.config)
    engine.submit(one)
    run(engine)
    if not keeps_others:
        assert isinstance(one.error, RuntimeError) and not one.answer
        return
    assert one.answer and len(one.answer.prompt_embeds) == len(media)
    failed = [event.number for event in seen if isinstance(event, MediumFailed)]
    assert failed == [n for n, modality in enumerate(media) if modality == failing]
    assert len(one.answer.outputs) == len(media) - len(failed)
    with pytest.raises(RuntimeError):
        assistant.chat(one.conversation, seed=3)


def test_loading_limit_ends_the_request(assistant: Assistant) -> None:
    one = request(assistant, "a", loading_seconds=0.01)
    check = one.check_loading()
    time.sleep(0.02)
    with pytest.raises(MediaError, match="more than 0 s to decode"):
        check()
