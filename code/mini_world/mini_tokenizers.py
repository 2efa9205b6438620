"""Tokenizers of the mini pipelines: small byte-pair encodings with one token a known word.

They are built from sampled captions within a second; unknown words are split into letters.
"""

import re
from collections.abc import Collection, Sequence

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BatchEncoding, CLIPTokenizer, PreTrainedTokenizerBase, RobertaTokenizer

from nextgpt.common.modality import MODALITIES
from nextgpt.mini_world.captions import sample_caption
from nextgpt.mini_world.objects import sample_object

_WORD_END = "</w>"
_MAX_VOCABULARY = 4096  # never reached: training stops when every word is one token
_CAPTIONS_PER_MODALITY = 4000  # every word occurs many times


def tokenizer_captions() -> list[str]:
    """Return a fixed sample of captions with all words of the training split."""
    rng = np.random.default_rng(0)
    return [
        sample_caption(sample_object(rng), modality, rng)
        for modality in MODALITIES
        for _ in range(_CAPTIONS_PER_MODALITY)
    ]


def build_clip_tokenizer(captions: Sequence[str], length: int) -> CLIPTokenizer:
    """Build a CLIP tokenizer that pads and truncates captions to `length` tokens.

    The merges are computed here, since those of the library's trainer differ from run to run.
    """
    words = sorted({word for caption in captions for word in re.findall("[a-z]+", caption)})
    merges: dict[tuple[str, str], None] = {}  # in order of rank
    split = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    while split:  # a merge of one word may apply first in another one and leave that one split
        for first, *others in split:
            for piece in others:
                merges.setdefault((first, piece))
                first += piece
        tokenizer = CLIPTokenizer(_vocabulary(merges), list(merges), model_max_length=length)
        split = [left for word in words if len(left := tokenizer.tokenize(word)) > 1]
    return tokenizer


def _vocabulary(merges: Collection[tuple[str, str]]) -> dict[str, int]:
    """Bytes, word-final bytes, merged tokens and the two special tokens."""
    characters = sorted(ByteLevel.alphabet())
    tokens = [*characters, *(character + _WORD_END for character in characters)]
    tokens += ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def build_roberta_tokenizer(captions: Sequence[str], length: int) -> RobertaTokenizer:
    """Build CLAP's RoBERTa tokenizer, which pads and truncates captions to `length` tokens."""
    empty = RobertaTokenizer(model_max_length=length, add_prefix_space=True)
    return empty.train_new_from_iterator([list(captions)], _MAX_VOCABULARY, show_progress=False)


def tokenize_captions(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> BatchEncoding:
    """Tokenize to the tokenizer's length: `input_ids` and `attention_mask` (N, T) int64."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
