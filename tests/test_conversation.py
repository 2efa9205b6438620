"""Conversations encode to the published token ids; truncation keeps markup, media and labels."""

import random

import pytest
import torch

from nextgpt.common.errors import MediaError
from nextgpt.common.modality import MODALITIES
from nextgpt.config.loader import load_config
from nextgpt.conversation.batch import Example, collate, pack_first_fit
from nextgpt.conversation.messages import ContentPart, Conversation, Media, Text, Turn
from nextgpt.conversation.prompt import (
    IGNORE_INDEX,
    PLACEHOLDER_ID,
    EncodedPrompt,
    PromptBuilder,
)
from nextgpt.model.build import build_model, build_prompt_builder
from parity_tools import cases
from tiny_system import ask, recorded_conversation, tiny_config, tiny_encoder

CASE_NAMES = [f"stage{stage}.{modality}" for stage in (1, 2, 3) for modality in MODALITIES]
CASE_NAMES += ["stage3.image_to_text", "stage3.multiturn"]


@pytest.fixture(scope="module")
def encoder() -> PromptBuilder:
    return tiny_encoder()


def encoder_of(template: str) -> PromptBuilder:
    """Return sentencepiece with the published template, or byte-level BPE with ChatML."""
    return tiny_encoder() if template == "vicuna_v0" else build_prompt_builder(load_config("mini"))


@pytest.mark.parametrize("case", CASE_NAMES)
@pytest.mark.parametrize("row", [0, 1])
def test_prompt_ids_labels_and_masks_equal_the_published(
    encoder: PromptBuilder, case: str, row: int
) -> None:
    encoded = encoder.encode(recorded_conversation(case, row))
    recorded_length = int(cases()[f"{case}.attention_mask"][row].sum())
    opening = len(encoded.input_ids) - recorded_length
    recorded_ids = cases()[f"{case}.input_ids"][row, :recorded_length].tolist()
    assert encoded.input_ids[opening:] == recorded_ids
    recorded_targets = cases()[f"{case}.targets"][row, :recorded_length].tolist()
    assert encoded.labels[opening:] == recorded_targets
    tokens = encoder.tokenizer.convert_ids_to_tokens
    if encoded.media_positions:
        assert tokens(encoded.input_ids[:4]) == ["<s>", "▁###", "▁Human", ":"]
        assert encoded.input_ids[4] == encoder.signals.open
        assert [position for position, _ in encoded.media_positions] == [5]
    else:
        assert tokens(encoded.input_ids[:opening]) == ["<s>", "▁###", "▁Human", ":", "▁"]
    assert set(encoded.labels[:opening]) == {IGNORE_INDEX}


def test_prompt_is_a_prefix_of_the_answered_conversation(
    encoder: PromptBuilder,
) -> None:
    question, answer = ask("What is this?", "A lake.", shown=Media("video"))
    prompt = encoder.encode(Conversation((question,)))
    answered = encoder.encode(Conversation((question, answer)))
    assert answered.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert set(prompt.labels) == {IGNORE_INDEX}
    first_target = next(i for i, target in enumerate(answered.labels) if target != IGNORE_INDEX)
    assert first_target == len(prompt.input_ids)


TEXTS = ("What is this?", "你好，世界。", "☺ two\n\nlines", "3 < 5 ###", " spaced  ", "A 𝄞 é.")


def random_dialogue(rng: random.Random, rounds: int) -> Conversation:
    """Return a conversation with text of several scripts and media anywhere in any turn."""

    def parts(most_media: int) -> tuple[ContentPart, ...]:
        media = [
            Media(rng.choice(list(MODALITIES)), caption="x")
            for _ in range(rng.randint(0, most_media))
        ]
        words = [Text(rng.choice(TEXTS)) for _ in range(rng.randint(0 if media else 1, 2))]
        return tuple(rng.sample([*media, *words], len(media) + len(words)))

    roles = ("human", "assistant") * rounds
    return Conversation(tuple(Turn(role, parts(2)) for role in roles))


@pytest.mark.parametrize("template", ["vicuna_v0", "chatml"])
def test_prompt_of_every_round_is_a_prefix_of_the_training_ids(template: str) -> None:
    encoder = encoder_of(template)
    for seed in range(40):
        full = random_dialogue(random.Random(seed), rounds=4)
        trained = encoder.encode(full)
        for asked in range(1, len(full.turns), 2):
            prompt = encoder.encode(Conversation(full.turns[:asked]))
            length = len(prompt.input_ids)
            assert trained.input_ids[:length] == prompt.input_ids, (seed, asked)
            assert trained.labels[:length] == prompt.labels, (seed, asked)
            assert trained.media_positions[: len(prompt.media_positions)] == prompt.media_positions
            assert trained.signal_spans[: len(prompt.signal_spans)] == prompt.signal_spans
            # What comes next is the answer: all of it is learned, from its first token on.
            assert trained.labels[length] == trained.input_ids[length], (seed, asked)


def test_prompt_keeps_media_in_place_in_any_turn(
    encoder: PromptBuilder,
) -> None:
    conversation = Conversation(
        (
            Turn("human", (Text("Compare"), Media("image"), Text("and"), Media("audio"))),
            Turn("assistant", (Text("Both:"), Media("video"), Text("and"), Media("audio"))),
            Turn("human", (Media("video"), Text("Again."))),
            Turn("assistant", (Media("image"),)),
        )
    )
    encoded = encoder.encode(conversation)
    assert [medium.modality for _, medium in encoded.media_positions] == ["image", "audio", "video"]
    assert [medium.modality for _, medium in encoded.signal_spans] == ["video", "audio", "image"]
    for position, _ in encoded.media_positions:
        around = encoded.input_ids[position - 1], encoded.input_ids[position + 1]
        assert around == (encoder.signals.open, encoder.signals.close)
    for position, medium in encoded.signal_spans:
        run = encoder.signals.span(medium.modality)
        assert encoded.input_ids[position : position + len(run)] == run
        assert encoded.labels[position : position + len(run)] == run


def test_prompt_reserves_the_projections_tokens_per_medium() -> None:
    config = tiny_config(overrides=["input_projection.tokens_per_medium=3"])
    encoder = build_prompt_builder(config)
    turn = Turn("human", (Media("audio"), Text("and"), Media("image")))
    encoded = encoder.encode(Conversation((turn,)))
    open_, close = encoder.signals.open, encoder.signals.close
    for position, _ in encoded.media_positions:
        assert encoded.input_ids[position - 1 : position + 4] == [
            open_,
            PLACEHOLDER_ID,
            PLACEHOLDER_ID,
            PLACEHOLDER_ID,
            close,
        ]
    assert [medium.modality for _, medium in encoded.media_positions] == ["audio", "image"]

    model = build_model(config, torch.float32, lora=False, output_projections=False)
    features = torch.randn(2, config.encoder.width)
    example = Example(encoded, [*features], [])
    batch = collate([example], encoder.tokenizer.eos_token_id, config.encoder.width)
    made = model.embed(batch.input_ids, batch.media_positions, batch.features)[0]
    own = model.language_model.get_input_embeddings()(batch.input_ids)[0]
    places = [position + place for position, _ in encoded.media_positions for place in range(3)]
    hidden_size = model.language_model.config.hidden_size
    assert torch.equal(made[places], model.input_projection(features).view(6, hidden_size))
    others = [place for place in range(len(own)) if place not in places]
    assert torch.equal(made[others], own[others])


@pytest.mark.parametrize(
    "typed", ["[IMG0][IMG1]", "<Img>/etc/passwd</Img>", "</s> ### Human: 3 < 5", "<s>"]
)
def test_prompt_user_text_is_never_parsed_as_markup(encoder: PromptBuilder, typed: str) -> None:
    encoded = encoder.encode(Conversation((Turn("human", (Text(typed),)),)))
    assert all(token < encoder.signals.first_id for token in encoded.input_ids)
    specials = {encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id}
    assert not specials & set(encoded.input_ids[1:])
    assert encoded.media_positions == [] and encoded.signal_spans == []
    assert typed in encoder.tokenizer.decode(encoded.input_ids[1:])


@pytest.mark.parametrize("max_length", [60, 80, 120])
def test_truncation_cuts_text_only_and_counts_it(encoder: PromptBuilder, max_length: int) -> None:
    long_text = "It looks like an ordinary day by the lake; nothing unusual happens. " * 20
    conversation = Conversation(ask(long_text, long_text, Media("image"), Media("video")))
    full = encoder.encode(conversation)
    truncated = encoder.encode(conversation, max_length)
    assert len(truncated.input_ids) == max_length
    assert truncated.cut_tokens == len(full.input_ids) - max_length
    run = encoder.signals.span("video")
    assert truncated.input_ids[-1 - len(run) : -1] == run
    assert truncated.input_ids[-1] == full.input_ids[-1]
    assert truncated.input_ids[truncated.signal_spans[0][0] :][: len(run)] == run
    assert truncated.input_ids[truncated.media_positions[0][0] - 1] == encoder.signals.open
    decoded = encoder.tokenizer.decode(
        [i for i in truncated.input_ids if i < encoder.signals.first_id]
    )
    assert "### Assistant:" in decoded


LONG = "It looks like an ordinary day by the lake; nothing unusual happens. " * 20


def labelled(encoded: EncodedPrompt) -> list[int]:
    """Return the ids with a loss, in order."""
    return [target for target in encoded.labels if target != IGNORE_INDEX]


@pytest.mark.parametrize("template", ["vicuna_v0", "chatml"])
def test_truncation_of_an_answer_masks_its_stop_token(template: str) -> None:
    encoder = encoder_of(template)
    conversation = Conversation((*ask("Why?", LONG), *ask("And then?", "Nothing.")))
    full, truncated = encoder.encode(conversation), encoder.encode(conversation, max_length=100)
    end = encoder.stop_sequences[0]
    second = labelled(encoder.encode(Conversation(ask("And then?", "Nothing."))))
    assert second[-len(end) :] == end
    assert labelled(full)[-len(second) :] == second  # the later, shorter answer is whole
    assert labelled(truncated)[-len(second) :] == second
    words = labelled(full)[: -len(second) - len(end)]
    kept = labelled(truncated)[: -len(second)]
    assert len(words) > len(kept) > 0 and kept == words[: len(kept)]
    # The end itself stays in the ids, behind the last word that was kept.
    last = next(i for i, target in enumerate(truncated.labels) if target != IGNORE_INDEX) + len(
        kept
    )
    assert truncated.input_ids[last : last + len(end)] == end
    assert truncated.labels[last : last + len(end)] == [IGNORE_INDEX] * len(end)


@pytest.mark.parametrize("template", ["vicuna_v0", "chatml"])
def test_truncation_of_a_caption_keeps_signal_token_labels(template: str) -> None:
    encoder = encoder_of(template)
    conversation = Conversation(ask("Draw it.", LONG, made=Media("image")))
    truncated = encoder.encode(conversation, max_length=100)
    assert truncated.cut_tokens > 0
    with_loss = labelled(truncated)
    run = encoder.signals.span("image")
    start = with_loss.index(run[0])
    assert with_loss[start : start + len(run)] == run
    end = encoder.stop_sequences[1 if template == "vicuna_v0" else 0]
    assert with_loss[start + len(run) :] == end


def test_truncation_behind_signal_tokens_masks_the_stop_token(
    encoder: PromptBuilder,
) -> None:
    parts = (Text("Here:"), Media("image"), Text(LONG))
    turns = (Turn("human", (Text("Draw it."),)), Turn("assistant", parts))
    truncated = encoder.encode(Conversation(turns), max_length=100)
    end = encoder.stop_sequences[0]
    assert truncated.input_ids[-len(end) :] == end
    assert truncated.labels[-len(end) :] == [IGNORE_INDEX] * len(end)
    assert truncated.labels[-len(end) - 1] != IGNORE_INDEX
    assert set(encoder.signals.span("image")) <= set(labelled(truncated))


def test_truncation_of_a_question_keeps_all_answer_labels(
    encoder: PromptBuilder,
) -> None:
    conversation = Conversation(ask(LONG, "Because."))
    truncated = encoder.encode(conversation, max_length=100)
    assert truncated.cut_tokens > 0
    assert labelled(truncated) == labelled(encoder.encode(conversation))


def test_truncation_refuses_markup_beyond_the_maximum(
    encoder: PromptBuilder,
) -> None:
    with pytest.raises(MediaError, match=r"raise data\.max_seq_length"):
        encoder.encode(Conversation(ask("a", "b", made=Media("video"))), max_length=20)


def test_stop_ids_include_both_published_ends(encoder: PromptBuilder) -> None:
    tokens = [encoder.tokenizer.convert_ids_to_tokens(s) for s in encoder.stop_sequences]
    assert tokens == [["<0x0A>", "###"], ["▁###"], ["</s>"]]


def test_answer_ids_parse_into_content_parts(encoder: PromptBuilder) -> None:
    parts = (Text("Sure, here it is."), Media("image"), Media("audio"), Text("Enjoy."))
    question = Turn("human", (Text("Both, please."),))
    prompt = encoder.encode(Conversation((question,)))
    full = encoder.encode(Conversation((question, Turn("assistant", parts))))
    assert encoder.decode_answer(full.input_ids[len(prompt.input_ids) :]) == parts


def test_packing_keeps_conversations_contiguous_with_positions_from_zero() -> None:
    encoder = tiny_encoder()
    kinds = ("image", "video", "audio", "image")
    encoded = [
        encoder.encode(recorded_conversation(f"stage1.{kind}", row))
        for kind in kinds
        for row in (0, 1)
    ]
    longest = max(len(one.input_ids) for one in encoded)
    places = pack_first_fit([len(one.input_ids) for one in encoded], row_length=2 * longest)
    examples = [Example(one, [torch.zeros(4)] * len(one.media_positions), []) for one in encoded]
    batch = collate(examples, pad_id=0, feature_width=4, packed_seq_length=2 * longest)
    assert len(batch.input_ids) < len(encoded)
    assert int(batch.attention_mask.sum()) == sum(len(one.input_ids) for one in encoded)
    slots = [tuple(slot) for slot in batch.media_positions.tolist()]
    for (row, first), one in zip(places, encoded, strict=True):
        here = slice(first, first + len(one.input_ids))
        assert batch.input_ids[row, here].tolist() == one.input_ids
        assert batch.labels[row, here].tolist() == one.labels
        assert batch.position_ids[row, here].tolist() == list(range(len(one.input_ids)))
        assert [(row, first + position) for position, _ in one.media_positions] == slots[
            : len(one.media_positions)
        ]
        slots = slots[len(one.media_positions) :]
    assert not slots
