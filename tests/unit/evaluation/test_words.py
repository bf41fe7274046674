"""Words of any script, as ROUGE and SQuAD's F1 count them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from dora_dist.evaluation.metrics import rouge_scores, squad_scores
from dora_dist.evaluation.words import RougeTokenizer, words_of

ENGLISH = "Running runs don't well-known 1,000 U.S. studies_of caresses ponies relational $5.50 generalizations".split()


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("\u5317\u4eac\u5927\u5b66\u5728\u6d77\u6dc0", "\u4e0a\u6d77\u7684\u5929\u6c14\u5f88\u597d"),
        (
            "\u043c\u0430\u043c\u0430 \u043c\u044b\u043b\u0430 \u0440\u0430\u043c\u0443",
            "\u043f\u0430\u043f\u0430 \u043f\u0438\u043b \u0447\u0430\u0439",
        ),
        ("ty\u00f6 alkaa", "ty\u00e4 jatkuu"),
        ("\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e", "\u0939\u0930 \u0926\u093f\u0928"),
    ],
    ids=["Chinese", "Russian", "Finnish", "Hindi"],
)
def test_rouge_of_equal_texts_is_1_in_any_script_and_less_of_others(text, other):
    assert rouge_scores(text, text) == {"rouge1": 1, "rouge2": 1, "rouge_l": 1}
    assert rouge_scores(text, other)["rouge1"] < 0.2
    assert rouge_scores(text, other)["rouge2"] == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("\u5317\u4eac\u5e02", "\u5317\u4eac", 4 / 5),  # two characters in common, of three and two
        ("\u0e01\u0e34\u0e19", "\u0e01\u0e34\u0e19\u0e02\u0e49\u0e32\u0e27", 4 / 7),  # a mark is part of its letter
        ("GPT\u6a21\u578b", "gpt", 1 / 2),
        ("\uc11c\uc6b8 \uc2dc", "\uc11c\uc6b8\uc2dc", 0),  # Korean has spaces
    ],
    ids=["Chinese", "Thai", "mixed", "Korean"],
)
def test_scripts_without_spaces_are_compared_by_characters(prediction, reference, score):
    assert squad_scores(prediction, [reference])[1] == pytest.approx(score)
    assert rouge_scores(prediction, reference)["rouge1"] == pytest.approx(score)


@given(st.text(st.characters(max_codepoint=127), max_size=60) | st.lists(st.sampled_from(ENGLISH)).map(" ".join))
def test_english_has_the_words_of_rouge_score(text):
    assert RougeTokenizer().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


def test_letters_are_the_same_however_they_are_encoded():
    assert words_of("Cafe\u0301, \u00c9TE\u0301!") == ["caf\u00e9", "\u00e9t\u00e9"]
    assert words_of("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645") == [
        "\u0645\u06cc\u062e\u0648\u0627\u0647\u0645"
    ]
