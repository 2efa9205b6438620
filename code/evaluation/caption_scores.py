"""Metrics of captions against several references: BLEU-4, METEOR's stand-in, ROUGE-L, CIDEr-D.

BLEU, ROUGE-L and CIDEr-D are those of COCO's caption evaluation (package pycocoevalcap), METEOR is
NLTK's. COCO's tokenizer, METEOR 1.5 and SPICE are Java programs and are not used: texts are split
by NLTK's Penn-Treebank tokenizer, and METEOR matches words and stems (Lavie and Agarwal, 2007), not
synonyms and paraphrases. All values are proportions, 10 at most for CIDEr-D.
"""

import re
from collections.abc import Sequence

METEOR = "METEOR-stem"
# Removed by COCO's tokenizer, as Penn-Treebank tokens.
_PUNCTUATION = {
    "''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--",
    "...", ";",
}  # fmt: skip
_BRACKETS = {"(": "-LRB-", ")": "-RRB-", "{": "-LCB-", "}": "-RCB-"}


class _NoSynonyms:
    """A WordNet without entries; NLTK's has to be downloaded."""

    def synsets(self, word: str) -> list:
        return []


def tokenize_caption(text: str) -> list[str]:
    """Split into lower-case Penn-Treebank tokens without punctuation."""
    from nltk.tokenize import NLTKWordTokenizer

    text = re.sub(r"(?<=\w)\.(?=\s)", " .", " ".join(text.split()))  # ends of inner sentences
    tokens = NLTKWordTokenizer().tokenize(text)
    return [t.lower() for t in tokens if _BRACKETS.get(t, t) not in _PUNCTUATION]


def score_captions(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return the corpus's `BLEU-4`, `METEOR-stem`, `ROUGE-L` and `CIDEr-D`.

    CIDEr-D weighs words by their frequency in the references of this corpus: values of subsets are
    not comparable, and that of a single caption is 0.

    Args:
        references: of each caption, one or more.
    """
    from nltk.translate.meteor_score import meteor_score
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if not captions:
        return {}
    tokens = [tokenize_caption(caption) for caption in captions]
    reference_tokens = [[tokenize_caption(one) for one in several] for several in references]
    found = {index: [" ".join(words)] for index, words in enumerate(tokens)}
    truth = {index: [" ".join(one) for one in many] for index, many in enumerate(reference_tokens)}
    bleu, _ = Bleu(4).compute_score(truth, found, verbose=0)
    meteor = [
        meteor_score(many, words, wordnet=_NoSynonyms()) if words else 0.0
        for words, many in zip(tokens, reference_tokens, strict=True)
    ]
    return {
        "BLEU-4": float(bleu[3]),
        METEOR: sum(meteor) / len(meteor),
        "ROUGE-L": float(Rouge().compute_score(truth, found)[0]),
        "CIDEr-D": float(Cider().compute_score(truth, found)[0]),
    }
