"""The two small tokenizers of the mini pipelines: every word of the mini world is one token.

Byte-pair encodings from captions, made in a second; other words fall into letters.
"""

import re
from collections.abc import Collection, Sequence

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BatchEncoding, CLIPTokenizer, PreTrainedTokenizerBase, RobertaTokenizer

from nextgpt.common.modality import MODALITIES
from nextgpt.mini_world.captions import caption
from nextgpt.mini_world.objects import sample_object

_WORD_END = "</w>"
_NO_LIMIT = 4096  # tokens; training stops earlier, when every word is whole
_SAMPLE = 4000  # captions of each modality; every word comes up many times


def sample_captions() -> list[str]:
    """Captions of all modalities, the same every time, with all words of the training split."""
    rng = np.random.default_rng(0)
    return [
        caption(sample_object(rng), modality, rng)
        for modality in MODALITIES
        for _ in range(_SAMPLE)
    ]


def clip_tokenizer(captions: Sequence[str], length: int) -> CLIPTokenizer:
    """CLIP's kind, for pictures and videos; captions are padded and cut to `length` tokens.

    Its merges are laid down here: the trainer's numbering of tokens differs from run to run.
    """
    words = sorted({word for caption in captions for word in re.findall("[a-z]+", caption)})
    merges: dict[tuple[str, str], None] = {}  # in order of rank
    split = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    while split:  # a merge of one word can come first in another and leave it in pieces
        for first, *others in split:
            for piece in others:
                merges.setdefault((first, piece))
                first += piece
        tokenizer = CLIPTokenizer(_vocabulary(merges), list(merges), model_max_length=length)
        split = [left for word in words if len(left := tokenizer.tokenize(word)) > 1]
    return tokenizer


def _vocabulary(merges: Collection[tuple[str, str]]) -> dict[str, int]:
    """Bytes, bytes at the end of a word, what the merges make, the two special tokens."""
    characters = sorted(ByteLevel.alphabet())
    tokens = [*characters, *(character + _WORD_END for character in characters)]
    tokens += ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def roberta_tokenizer(captions: Sequence[str], length: int) -> RobertaTokenizer:
    """CLAP's kind, for sounds; captions are padded and cut to `length` tokens."""
    empty = RobertaTokenizer(model_max_length=length, add_prefix_space=True)
    return empty.train_new_from_iterator([list(captions)], _NO_LIMIT, show_progress=False)


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> BatchEncoding:
    """`input_ids` and `attention_mask` of captions padded and cut: (N, T) int64."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
