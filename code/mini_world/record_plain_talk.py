"""Generate the answers of `plain_talk` greedily with SmolLM2-135M-Instruct; about 12 minutes.

    python -m nextgpt.mini_world.record_plain_talk

Answers are truncated after a whole sentence and not checked for truth; those that repeat a sentence
are left out.
"""

import re
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from nextgpt.common.cli import run_cli
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json
from nextgpt.config.loader import load_config
from nextgpt.conversation.messages import Conversation, Text, Turn
from nextgpt.generation.decoding import greedy_answers
from nextgpt.generation.sampling import join_texts
from nextgpt.mini_world.plain_talk import ANSWERS_FILE
from nextgpt.model.build import build_prompt_builder
from nextgpt.model.loading import load_pretrained, resolve_model_path

QUESTIONS = Path(__file__).with_name("plain_talk_questions.txt")
_MAX_NEW_TOKENS = 72
_BATCH_SIZE = 16
_SENTENCE_END = re.compile(r"[.!?][\"')]*(?=\s)")


def record_answers() -> list[tuple[str, str]]:
    """Generate answers with the untuned language model of the mini configuration."""
    config = load_config("mini")
    prompt_builder = build_prompt_builder(config)
    path = resolve_model_path(config.language_model.path)
    model = load_pretrained(AutoModelForCausalLM, path, torch.float32).eval()
    questions = QUESTIONS.read_text(encoding="utf-8").splitlines()
    pairs = []
    for start in tqdm(range(0, len(questions), _BATCH_SIZE)):
        batch = questions[start : start + _BATCH_SIZE]
        conversations = [Conversation((Turn("human", (Text(question),)),)) for question in batch]
        prompts = [prompt_builder.encode(one).input_ids for one in conversations]
        answers = greedy_answers(model, prompt_builder, prompts, _MAX_NEW_TOKENS)
        for question, ids in zip(batch, answers, strict=True):
            ended = len(ids) < _MAX_NEW_TOKENS
            if answer := _whole_sentences(join_texts(prompt_builder.decode_answer(ids)), ended):
                pairs.append((question, answer))
    return pairs


def _whole_sentences(answer: str, ended: bool) -> str:
    """Truncate after the last whole sentence; empty without one or with a repeated one."""
    ends = [end.end() for end in _SENTENCE_END.finditer(answer)]
    if not ended:
        # The number of the next list item is no sentence.
        answer = re.sub(r"\s+\d+\.$", "", answer[: ends[-1]]) if ends else ""
    sentences = [sentence.strip() for sentence in _SENTENCE_END.split(answer) if sentence.strip()]
    return answer.strip() if len(set(sentences)) == len(sentences) else ""


def main() -> None:
    """Generate the answers and write them."""
    pairs = record_answers()
    with atomic_write(ANSWERS_FILE) as temporary:
        rows = ",\n".join(to_json(pair, ensure_ascii=False) for pair in pairs)
        temporary.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    print(f"{len(pairs)} answers in {ANSWERS_FILE}")


if __name__ == "__main__":
    run_cli(main)
