"""Text stays text: plain questions draw no media, and the words stay those of the untuned model.

The untuned model answers a hundred plain questions; its own answers are then read by the tuned one.
A perplexity near the untuned model's own says that the tuning left its talk alone. About 150 s on
one core with SmolLM2.
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
from nextgpt.generation.sampling import greedy_answers
from nextgpt.generation.settings import GenerationSettings
from nextgpt.mini_world.objects import Split
from nextgpt.mini_world.scoreboard.runner import AT_ONCE, Clock, OnProgress, in_batches
from nextgpt.model.loading import load_pretrained, resolve_model_path

_ANSWER_TOKENS = 64


def plain_questions(split: Split) -> list[str]:
    """Read the hundred plain questions of a split; none of them is trained on."""
    path = Path(__file__).with_name(f"plain_questions_{split}.txt")
    return path.read_text(encoding="utf-8").splitlines()


def talk_plainly(
    assistant: Assistant,
    questions: Sequence[str],
    options: GenerationSettings,
    clock: Clock,
    tell: OnProgress,
) -> dict[str, Any]:
    """Ask plain questions; the answers have at most 64 tokens.

    Returns:
        `n`, `right` (drew no media) with its `interval`; `perplexity` and `untuned_perplexity` of
        the untuned model's answers under either model, and their `ratio`; some `examples`.
    """
    turns = [Turn("human", (Text(question),)) for question in questions]
    conversations = [Conversation((turn,)) for turn in turns]
    options = replace(options, max_new_tokens=min(options.max_new_tokens, _ANSWER_TOKENS))
    answers = []
    for batch in in_batches(conversations):
        answers += assistant.answer(
            batch, seeds=[0] * len(batch), settings=options, media_at_once=AT_ONCE
        )
        clock.add(answers[-1].seconds)
        tell(len(batch))
    drew = [any(isinstance(part, Media) for part in answer.turn.parts) for answer in answers]
    with clock.time("perplexity"):
        figures = _perplexities(assistant, conversations)
    examples = list(zip(questions, (answer.text for answer in answers), strict=True))
    return {**proportion([not one for one in drew]), **figures, "examples": examples}


def _perplexities(assistant: Assistant, conversations: Sequence[Conversation]) -> dict[str, float]:
    encoder, tuned = assistant.prompt_builder, assistant.model.language_model
    path = resolve_model_path(assistant.config.language_model.path)
    untuned = load_pretrained(AutoModelForCausalLM, path, tuned.dtype).to(assistant.device).eval()
    prompts = [encoder.encode(conversation).input_ids for conversation in conversations]
    answers: list[list[int]] = []
    for batch in in_batches(prompts):
        answers += greedy_answers(untuned, encoder, batch, _ANSWER_TOKENS)
    own = perplexity(untuned, prompts, answers)
    found = perplexity(tuned, prompts, answers)
    return {"perplexity": found, "untuned_perplexity": own, "ratio": found / own}


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> float:
    """Of all the answers' tokens, their ends included, behind the prompts."""
    loss, count = 0.0, 0
    for batch in in_batches(list(zip(prompts, answers, strict=True))):
        rows = [torch.tensor(prompt + answer, device=model.device) for prompt, answer in batch]
        # Causal: nothing sees the padding behind it, so that no mask is needed.
        hidden = model.model(pad_sequence(rows, batch_first=True)).last_hidden_state  # (B, L, H)
        for row, states, (prompt, answer) in zip(rows, hidden, batch, strict=True):
            before = states[len(prompt) - 1 : len(prompt) + len(answer) - 1]
            logits = model.get_output_embeddings()(before).float()
            targets = row[len(prompt) :]
            loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(answer)
    return math.exp(loss / count)
