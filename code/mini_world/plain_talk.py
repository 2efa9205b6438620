"""Plain talk: the untuned language model's own answers to plain questions.

Tuning on what the model says anyway keeps it talking as it did. The answers come from
`record_plain_talk`. Only greetings, which the model does not understand, are answered here.
"""

import json
from pathlib import Path

import numpy as np

ANSWERS = Path(__file__).with_name("plain_talk.json")
_GREETINGS = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi there.", "Hi! What can I do for you?"),
    ("Good morning.", "Good morning! How can I help you today?"),
    ("Good evening!", "Good evening! What can I do for you?"),
    ("How are you?", "I am fine, thank you. How are you?"),
    ("Thank you!", "You are welcome."),
    ("Thanks a lot.", "You are welcome. Is there anything else?"),
    ("Goodbye.", "Goodbye! Have a nice day."),
    ("See you later.", "See you later!"),
    ("What can you do?", "I can talk, and I can take in and make pictures, videos and sounds."),
    ("Who are you?", "I am an assistant that works with text, pictures, videos and sounds."),
    ("Can you help me?", "Yes, of course. What do you need?"),
)


def plain_pairs(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Pairs of question and answer in random order, no question twice."""
    recorded = json.loads(ANSWERS.read_text(encoding="utf-8"))
    pairs = [*_GREETINGS, *(tuple(pair) for pair in recorded)]
    return [pairs[index] for index in rng.permutation(len(pairs))]
