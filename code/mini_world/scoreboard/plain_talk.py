"""Plain talk: text-only questions get no media, and the language model is not degraded.

The untuned model answers a hundred plain questions; the tuned model's perplexity on these answers
should be close to the untuned model's. About 150 s on one core with SmolLM2.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.evaluation.metrics import proportion
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.decoding import greedy_answers
from nextgpt.generation.events import Answer
from nextgpt.generation.settings import GenerationSettings
from nextgpt.mini_world.objects import Split
from nextgpt.mini_world.scoreboard.runner import BATCH_SIZE, OnProgress, Timer, batched
from nextgpt.model.loading import load_pretrained, resolve_model_path

_ANSWER_TOKENS = 64


def plain_questions(split: Split) -> list[str]:
    """Return the hundred plain questions of a split; none is in the training data."""
    return read_texts(f"plain_questions_{split}")


def read_texts(name: str) -> list[str]:
    """Return the lines of a text file of this folder."""
    return Path(__file__).with_name(f"{name}.txt").read_text(encoding="utf-8").splitlines()


def as_conversations(texts: Sequence[str]) -> list[Conversation]:
    """Conversations of one human turn each."""
    return [Conversation((Turn("human", (Text(text),)),)) for text in texts]


def score_plain_talk(
    assistant: Assistant,
    questions: Sequence[str],
    settings: GenerationSettings,
    timer: Timer,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Answer plain questions, with at most 64 tokens each, and score the answers.

    Returns:
        `n`, `right` (no media generated) and its `interval`; `perplexity` (tuned model) and
        `untuned_perplexity` of the untuned model's answers, and their `ratio`; `examples`.
    """
    conversations = as_conversations(questions)
    answers = answer_texts(assistant, conversations, settings, timer, on_progress)
    with timer.time("perplexity"):
        perplexities = _perplexities(assistant, conversations)
    examples = list(zip(questions, (answer.text for answer in answers), strict=True))
    return {
        **proportion([not has_media(answer) for answer in answers]),
        **perplexities,
        "examples": examples,
    }


def answer_texts(
    assistant: Assistant,
    conversations: Sequence[Conversation],
    settings: GenerationSettings,
    timer: Timer,
    on_progress: OnProgress,
) -> list[Answer]:
    """Answer with at most 64 tokens each."""
    settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, _ANSWER_TOKENS))
    answers: list[Answer] = []
    for batch in batched(conversations):
        answers += assistant.answer(
            batch, seeds=[0] * len(batch), settings=settings, media_at_once=BATCH_SIZE
        )
        timer.add(answers[-1].seconds)
        on_progress(len(batch))
    return answers


def has_media(answer: Answer) -> bool:
    """Whether an answer calls for a medium."""
    return any(isinstance(part, Media) for part in answer.turn.parts)


def _perplexities(assistant: Assistant, conversations: Sequence[Conversation]) -> dict[str, float]:
    encoder, tuned = assistant.prompt_builder, assistant.model.language_model
    path = resolve_model_path(assistant.config.language_model.path)
    untuned = load_pretrained(AutoModelForCausalLM, path, tuned.dtype).to(assistant.device).eval()
    prompts = [encoder.encode(conversation).input_ids for conversation in conversations]
    answers: list[list[int]] = []
    for batch in batched(prompts):
        answers += greedy_answers(untuned, encoder, batch, _ANSWER_TOKENS)
    before = perplexity(untuned, prompts, answers)
    after = perplexity(tuned, prompts, answers)
    return {"perplexity": after, "untuned_perplexity": before, "ratio": after / before}


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> float:
    """Return the perplexity of all answers, EOS included, given their prompts."""
    loss, count = 0.0, 0
    for batch in batched(list(zip(prompts, answers, strict=True))):
        rows = [torch.tensor(prompt + answer, device=model.device) for prompt, answer in batch]
        # Right padding in a causal model: no attention mask is needed.
        hidden = model.model(pad_sequence(rows, batch_first=True)).last_hidden_state  # (B, L, H)
        for row, states, (prompt, answer) in zip(rows, hidden, batch, strict=True):
            before = states[len(prompt) - 1 : len(prompt) + len(answer) - 1]
            logits = model.get_output_embeddings()(before).float()
            labels = row[len(prompt) :]
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += len(answer)
    return math.exp(loss / count)
