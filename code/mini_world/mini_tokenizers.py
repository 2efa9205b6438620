"""The two small tokenizers of the mini pipelines: every word of the mini world is one token.

Byte-pair encodings trained on captions in a second; other words fall into letters.
"""

import string
from collections.abc import Sequence

import numpy as np
from transformers import CLIPTokenizer, RobertaTokenizer

from conversation.parts import MODALITIES
from mini_world.captions import caption
from mini_world.things import sample_thing

_NO_LIMIT = 4096  # tokens; training stops earlier, when every word is whole
_SAMPLE = 2000  # captions of each modality and split; every word comes up many times


def sample_captions() -> list[str]:
    """Captions of all modalities and both splits, the same every time, with all words there are."""
    rng = np.random.default_rng(0)
    return [
        caption(sample_thing(rng, split), modality, rng, split=split)
        for modality in MODALITIES
        for split in ("training", "held_out")
        for _ in range(_SAMPLE)
    ]


def clip_tokenizer(captions: Sequence[str], length: int) -> CLIPTokenizer:
    """CLIP's kind, for pictures and videos; captions are padded and cut to `length` tokens."""
    # Single characters are there so that each also exists at the end of a word.
    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    empty = CLIPTokenizer(model_max_length=length)
    corpus = [[*captions, *characters]]
    return empty.train_new_from_iterator(corpus, _NO_LIMIT, show_progress=False)


def roberta_tokenizer(captions: Sequence[str], length: int) -> RobertaTokenizer:
    """CLAP's kind, for sounds; captions are padded and cut to `length` tokens."""
    empty = RobertaTokenizer(model_max_length=length, add_prefix_space=True)
    return empty.train_new_from_iterator([list(captions)], _NO_LIMIT, show_progress=False)
