"""Another language model and other decoders by configuration: all stages and an answer."""

import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.config.loader import load_config
from nextgpt.config.schema import Config
from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.settings import GenerationSettings
from nextgpt.mini_world.mini_decoders import build_mini_decoder
from nextgpt.model.delta import load_delta, read_delta
from parity_tools import PARITY
from test_chat_template import ZEPHYR
from tiny_decoders import CAPTIONS, TINY
from tiny_run import TinyRun, tiny_world
from tiny_system import tiny_model

SIGNALS: dict[Modality, int] = {"image": 3, "video": 5, "audio": 2}
OTHER = replace(TINY, text_width=48, text_tokens=10, audio_embed_dim=24)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a grouped-query language model with a chat template, and for decoders."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = AutoTokenizer.from_pretrained(PARITY / "llama_tiny")
    tokenizer.chat_template = ZEPHYR
    tokenizer.save_pretrained(folder / "language_model")
    llama_config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=request.param,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config).save_pretrained(folder / "language_model")
    picture = [OTHER.text_tokens, OTHER.text_width]
    shapes = {"image": picture, "video": picture, "audio": [OTHER.audio_embed_dim]}
    sets = [
        f"language_model.path={folder / 'language_model'}",
        "language_model.prompt_format=tokenizer",
        "data.caption_embeddings=online",
    ]
    for modality in MODALITIES:
        build_mini_decoder(modality, folder / modality, 1, CAPTIONS[:1], OTHER)
        sets.append(f"decoders.{modality}.path={folder / modality}")
        sets.append(f"decoders.{modality}.prompt_embeds_shape={shapes[modality]}")
        sets.append(f"decoders.{modality}.signal_tokens={SIGNALS[modality]}")
    return sets


@pytest.fixture(scope="module")
def stages(other: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[TinyRun]:
    """Runs of all stages on those components."""
    path = tmp_path_factory.mktemp("stages")
    return [TinyRun(path, stage, other).finish() for stage in (1, 2, 3, 4)]


def test_other_components_train_in_all_stages(stages: list[TinyRun]) -> None:
    for run in stages:
        assert len(run.losses) == 4 and run.metrics[-1]["skipped"] == 0
    rows = {n: t.shape for n, t in stages[-1].delta.items() if n.endswith("new_rows")}
    assert set(rows.values()) == {(2 + sum(SIGNALS.values()), 96)}
    image = stages[-1].delta["output_projections.image.fc.weight"]
    assert image.shape[1] == 96


def config_of(run: TinyRun) -> Config:
    overrides = [word for flag, word in pairwise(run.arguments) if flag == "--set"]
    return load_config("7b", overrides=overrides)


@pytest.mark.parametrize("modality", MODALITIES)
@torch.no_grad()
def test_other_components_answer_with_their_decoders_media(
    stages: list[TinyRun], modality: Modality
) -> None:
    assistant = Assistant.from_config(config_of(stages[-1]), stages[-1].folder)
    signals = assistant.prompt_builder.signals
    row = assistant.model.language_model.get_output_embeddings().new_rows[
        signals.span(modality)[0] - signals.first_id
    ]
    options = replace(GenerationSettings.from_config(assistant.config), top_p=1.0)
    asked = Conversation((Turn("human", (Text("Show me all of it."),)),))
    row *= 200  # whatever is said, a run of it begins now and then: for one of the two signs
    answers = [assistant.chat(asked, seed=1, settings=options)]
    row *= -1
    answers.append(assistant.chat(asked, seed=1, settings=options))
    media = [part for one in answers for part in one.turn.parts if isinstance(part, Media)]
    captions = [caption for one in answers for caption in one.prompt_embeds]
    shape = tuple(assistant.config.decoders[modality].prompt_embeds_shape)
    assert (modality, shape) in [
        (medium.modality, tuple(caption.shape))
        for medium, caption in zip(media, captions, strict=True)
    ]


def test_other_components_delta_is_refused_by_another_model(stages: list[TinyRun]) -> None:
    delta = read_delta(stages[-1].folder)
    with pytest.raises(UserError, match=r"input_projection.bias: shape \(96,\), expected \(128,\)"):
        load_delta(tiny_model(lora=True), delta, {"input_projection"})


def test_other_decoder_embeddings_are_refused_with_decoder_or_shapes(
    stages: list[TinyRun], other: list[str], tmp_path: Path
) -> None:
    precomputed = [*other, "data.caption_embeddings=precomputed"]
    start = ["--init-from", str(stages[0].folder)]
    message = TinyRun(tmp_path, 2, precomputed, start).fail()
    assert re.search(r"the \w+ embeddings in .*embed were made by .*, whose text encoder", message)
    records = shutil.ignore_patterns("captions.*", "embeddings.*", ".*")
    shutil.copytree(tiny_world() / "embed", tmp_path / "embed", ignore=records)
    unrecorded = [*precomputed, f"data.caption_embedding_dir={tmp_path / 'embed'}"]
    message = TinyRun(tmp_path / "unrecorded", 2, unrecorded, start).fail()
    assert re.search(r"shape \((12, 32|16,)\), expected \((10, 48|24,)\)", message)
