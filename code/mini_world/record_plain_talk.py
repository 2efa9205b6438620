"""Records the answers for `plain_talk`: SmolLM2-135M-Instruct's likeliest ones, some 12 minutes.

They are cut after a sentence, and as right or wrong as it is; those that say a sentence twice are
left out. The questions lie beside them.

    cd code; python -m nextgpt.mini_world.record_plain_talk
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
from nextgpt.generation.sampling import greedy_answers, join_texts
from nextgpt.mini_world.plain_talk import ANSWERS
from nextgpt.model.build import build_prompt_builder, resolve_model_path
from nextgpt.model.pretrained_folder import load_pretrained

QUESTIONS = Path(__file__).with_name("plain_talk_questions.txt")
_TOKENS = 72  # an answer that goes on is cut after its last whole sentence
_AT_ONCE = 16
_SENTENCE_END = re.compile(r"[.!?][\"')]*(?=\s)")


def record_answers() -> list[tuple[str, str]]:
    """Ask the untuned language model of the mini configuration all questions."""
    config = load_config("mini")
    encoder = build_prompt_builder(config)
    path = resolve_model_path(config.language_model.path)
    model = load_pretrained(AutoModelForCausalLM, path, torch.float32).eval()
    questions = QUESTIONS.read_text(encoding="utf-8").splitlines()
    pairs = []
    for start in tqdm(range(0, len(questions), _AT_ONCE)):
        asked = questions[start : start + _AT_ONCE]
        turns = [Conversation((Turn("human", (Text(question),)),)) for question in asked]
        prompts = [encoder.encode(turn).input_ids for turn in turns]
        answers = greedy_answers(model, encoder, prompts, _TOKENS)
        for question, ids in zip(asked, answers, strict=True):
            if answer := _whole_sentences(
                join_texts(encoder.decode_answer(ids)), len(ids) < _TOKENS
            ):
                pairs.append((question, answer))
    return pairs


def _whole_sentences(answer: str, ended: bool) -> str:
    """The answer up to its last whole sentence; empty if there is none, or one comes twice."""
    ends = [end.end() for end in _SENTENCE_END.finditer(answer)]
    if not ended:
        # The number of a list's next entry is no sentence.
        answer = re.sub(r"\s+\d+\.$", "", answer[: ends[-1]]) if ends else ""
    sentences = [sentence.strip() for sentence in _SENTENCE_END.split(answer) if sentence.strip()]
    return answer.strip() if len(set(sentences)) == len(sentences) else ""


def main() -> None:
    """Record and write."""
    pairs = record_answers()
    with atomic_write(ANSWERS) as aside:
        rows = ",\n".join(to_json(pair, ensure_ascii=False) for pair in pairs)
        aside.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    print(f"{len(pairs)} answers in {ANSWERS}")


if __name__ == "__main__":
    run_cli(main)
