"""The two small tokenizers of the mini pipelines: every word of the mini world is one token.

Byte-pair encodings trained on the captions' words in a second; other words fall into letters.
"""

import string
from collections.abc import Iterable

from transformers import CLIPTokenizer, RobertaTokenizer

_NO_LIMIT = 4096  # tokens; training stops earlier, when every word is whole


def clip_tokenizer(words: Iterable[str], length: int) -> CLIPTokenizer:
    """CLIP's kind, for pictures and videos; captions are padded and cut to `length` tokens."""
    # Single characters are there so that each also exists at the end of a word.
    corpus = [*sorted(set(words)), *string.ascii_lowercase, *string.digits, *string.punctuation]
    empty = CLIPTokenizer(model_max_length=length)
    return empty.train_new_from_iterator([corpus], _NO_LIMIT, show_progress=False)


def roberta_tokenizer(words: Iterable[str], length: int) -> RobertaTokenizer:
    """CLAP's kind, for sounds; captions are padded and cut to `length` tokens."""
    empty = RobertaTokenizer(model_max_length=length, add_prefix_space=True)
    return empty.train_new_from_iterator([sorted(set(words))], _NO_LIMIT, show_progress=False)
