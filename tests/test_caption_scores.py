"""Metrics of captions against values computed by hand from their published definitions."""

from math import exp

import pytest

from nextgpt.evaluation.caption_scores import score_captions, tokenize_caption


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man's dog (brown) runs. It doesn't stop!", "a man 's dog brown runs it does n't stop"),
        ('"Hi," she said -- a well-known cat...', "hi she said a well-known cat"),
        (" two\tcats ;\n", "two cats"),
        ("", ""),
    ],
)
def test_captions_are_tokenized_as_in_the_penn_treebank_without_punctuation(
    text: str, tokens: str
) -> None:
    assert tokenize_caption(text) == tokens.split()


def test_bleu_is_the_geometric_mean_of_precisions() -> None:
    """Precisions 4/5, 3/4, 2/3 and 1/2 (Papineni et al., 2002)."""
    scores = score_captions(["a b c d e"], [["a b c d f"]])
    assert scores["BLEU-4"] == pytest.approx(0.2**0.25, rel=1e-6)


def test_bleu_takes_the_closest_reference_for_brevity() -> None:
    """Six words against five and ten: the closest is shorter; four against ten: exp(1 - 10/4)."""
    references = [["a b c d e", "a b c d e f g h i j"]]
    assert score_captions(["a b c d e f"], references)["BLEU-4"] == pytest.approx(1, rel=1e-6)
    brief = score_captions(["a b c d"], [["a b c d e f g h i j"]])
    assert brief["BLEU-4"] == pytest.approx(exp(1 - 10 / 4), rel=1e-6)


def test_meteor_matches_words_and_stems_with_a_penalty_for_chunks() -> None:
    """F = 10 P R / (R + 9 P), times 1 - 0.5 (chunks / matches)^3 (Lavie and Agarwal, 2007)."""
    same = score_captions(["the dog runs fast"], [["the dog runs fast"]])
    assert same["METEOR-stem"] == pytest.approx(1 - 0.5 * (1 / 4) ** 3)
    stems = score_captions(["the dogs running fast"], [["the dog runs fast"]])
    assert stems["METEOR-stem"] == pytest.approx(same["METEOR-stem"])
    swapped = score_captions(["fast runs dog the"], [["the dog runs fast"]])
    assert swapped["METEOR-stem"] == pytest.approx(1 - 0.5)
    partly = score_captions(["the dog sleeps"], [["the dog runs fast"]])
    mean = 10 * (2 / 3) * (2 / 4) / (2 / 4 + 9 * 2 / 3)
    assert partly["METEOR-stem"] == pytest.approx(mean * (1 - 0.5 * (1 / 2) ** 3))


def test_meteor_takes_the_best_reference() -> None:
    scores = score_captions(["a red circle"], [["nothing of it", "a red circle"]])
    assert scores["METEOR-stem"] == pytest.approx(1 - 0.5 / 27)


def test_rouge_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    """P = 3/4, R = 3/5, beta 1.2 (Lin, 2004)."""
    scores = score_captions(["the cat is here"], [["the black cat is asleep"]])
    expected = (1 + 1.2**2) * (3 / 4) * (3 / 5) / (3 / 5 + 1.2**2 * 3 / 4)
    assert scores["ROUGE-L"] == pytest.approx(expected)


def test_cider_of_the_references_themselves_is_ten() -> None:
    """All four n-gram orders have cosine 1 (Vedantam et al., 2015)."""
    captions = ["a b c d e", "f g h i j"]
    assert score_captions(captions, [[c] for c in captions])["CIDEr-D"] == pytest.approx(10)


def test_cider_penalizes_lengths_and_clips_repetition() -> None:
    """The second caption has its reference's words twice: counts are clipped to one.

    Cosine of order n: 5 - n clipped counts of 1 over the norms, with n - 1 further n-grams across
    the seam; times exp(-(8 - 4)^2 / (2 · 6^2)) for the length.
    """
    captions = ["a b c d", "e f g h e f g h"]
    references = [["a b c d"], ["e f g h"]]
    cosines = [
        matching / (matching**0.5 * (4 * matching + seam) ** 0.5)
        for matching, seam in ((4, 0), (3, 1), (2, 2), (1, 3))
    ]
    doubled = exp(-16 / 72) * sum(cosines) / 4 * 10
    found = score_captions(captions, references)["CIDEr-D"]
    assert found == pytest.approx((10 + doubled) / 2)


def test_empty_captions_score_zero() -> None:
    scores = score_captions(["", "a dog"], [["a cat"], ["a dog"]])
    assert scores["METEOR-stem"] == pytest.approx((1 - 0.5 / 8) / 2)
    assert score_captions([], []) == {}
