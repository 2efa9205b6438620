"""The published system on the recorded small components, with weights by recipe."""

import copy
import json
from functools import cache

import torch

from nextgpt.config.loader import load_config
from nextgpt.config.schema import Config
from nextgpt.conversation.batch import Batch, Example, collate
from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.conversation.prompt import PromptBuilder
from nextgpt.dataset.record_fields import clean_caption
from nextgpt.model.build import build_model, build_prompt_builder
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.trainable import group_of, tuned_parameters
from nextgpt.model.upstream_checkpoint import published_name
from parity.recipe import new_vocabulary_rows, recipe_tensor
from parity_tools import PARITY, cases

TEXTS = json.loads((PARITY / "texts.json").read_text())
TINY_OVERRIDES = [
    f"language_model.path={PARITY / 'llama_tiny'}",
    "encoder.width=32",
    "language_model.lora_dropout=0.0",
    "training.activation_checkpointing=false",
]


def tiny_config(stage: int | None = None, overrides: list[str] | None = None) -> Config:
    """Load the published configuration with the recorded small language model and encoder."""
    return load_config("7b", stage, TINY_OVERRIDES + (overrides or []))


def tiny_encoder() -> PromptBuilder:
    return build_prompt_builder(tiny_config())


def tiny_model(*, lora: bool) -> NextGPT:
    """Return the model of the recorded cases in float32 with recipe weights."""
    return copy.deepcopy(_filled_model(lora))


@cache
@torch.no_grad()
def _filled_model(lora: bool) -> NextGPT:
    model = build_model(tiny_config(), torch.float32, lora=lora, output_projections=True)
    lm = model.language_model
    lm.get_input_embeddings().new_rows.copy_(new_vocabulary_rows("embed_tokens"))
    lm.get_output_embeddings().new_rows.copy_(new_vocabulary_rows("lm_head"))
    for name, parameter in tuned_parameters(model, base_vocabulary=False):
        if group_of(name) != "vocabulary":
            parameter.copy_(recipe_tensor(published_name(name), parameter.shape))
    return model


@torch.no_grad()
def randomise_adapters(model: NextGPT) -> None:
    """Randomize the adapters' zero-initialized B matrices."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_()


def ask(
    question: str, answer: str, shown: Media | None = None, made: Media | None = None
) -> tuple[Turn, Turn]:
    """Return one round, with a medium before the question or after the answer."""
    return (
        Turn("human", (*([shown] if shown else []), Text(question))),
        Turn("assistant", (Text(answer), *([made] if made else []))),
    )


def recorded_conversation(case: str, row: int) -> Conversation:
    """Return the conversation of row `row` of the recorded case, e.g. `stage2.video`."""
    stage, kind = case.split(".")
    if stage == "stage3":
        question, answer = TEXTS["conv"][row]
        if kind == "image_to_text":
            return Conversation(ask(question, answer, shown=Media("image")))
        if kind == "multiturn":
            other_question, other_answer = TEXTS["conv"][1 - row]
            first = ask(question, answer, shown=Media("image"))
            return Conversation(first + ask(other_answer, other_question))
        return Conversation(ask(question, answer, made=Media(kind, caption="recorded")))
    caption = clean_caption(TEXTS[kind][row])
    if stage == "stage1":
        return Conversation(ask("generate a caption", caption, shown=Media(kind)))
    return Conversation(ask(caption, caption, made=Media(kind, caption=caption)))


def recorded_batch(case: str) -> Batch:
    """Return the batch of the recorded case with its features and caption embeddings."""
    kind = case.split(".")[1]
    encoder = tiny_encoder()
    shown = "image" if kind in ("image_to_text", "multiturn") else kind
    examples = []
    for row in (0, 1):
        prompt = encoder.encode(recorded_conversation(case, row))
        features = [cases()[f"imagebind.{shown}"][row] for _ in prompt.media_positions]
        targets = [cases()[f"in.caption_emb.{m.modality}"][row] for _, m in prompt.signal_spans]
        examples.append(Example(prompt, features, targets))
    return collate(examples, encoder.tokenizer.eos_token_id, feature_width=32)
