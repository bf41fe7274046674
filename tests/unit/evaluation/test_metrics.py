import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_dist.evaluation.metrics import (
    CLASS_METRICS,
    NUMBER_METRICS,
    accuracy,
    f1,
    final_number,
    first_answer,
    matthews,
    normalize_answer,
    pearson,
    rouge_scores,
    same_final_number,
    spearman,
    squad_scores,
)

# 3 of class 1 found, 1 missed, 2 wrongly found, 4 of class 0 right.
WANTED = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
GIVEN = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
BITS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)
NUMBERS = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=30)


def test_metrics_of_two_classes_by_hand():
    assert accuracy(GIVEN, WANTED) == pytest.approx(7 / 10)
    assert f1(GIVEN, WANTED) == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert matthews(GIVEN, WANTED) == pytest.approx((3 * 4 - 2 * 1) / math.sqrt(5 * 4 * 6 * 5))


def test_matthews_of_three_classes_by_hand():
    # Gorodkin's R_K from the confusion matrix [[2, 1, 0], [0, 2, 0], [1, 0, 1]] (rows: labels).
    labels, predictions = [0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 0, 2]
    right, all_of_them, given, wanted = 5, 7, [3, 3, 1], [3, 2, 2]
    top = right * all_of_them - sum(g * w for g, w in zip(given, wanted, strict=True))
    below = math.sqrt((49 - sum(g * g for g in given)) * (49 - sum(w * w for w in wanted)))
    assert matthews(predictions, labels) == pytest.approx(top / below)


@given(BITS)
def test_metrics_of_two_classes_agree_with_their_definitions(pairs):
    predictions, labels = map(list, zip(*pairs, strict=True))
    found, spurious = pairs.count((1, 1)), pairs.count((1, 0))
    missed, left = pairs.count((0, 1)), pairs.count((0, 0))
    below = (found + spurious) * (found + missed) * (left + spurious) * (left + missed)
    wanted = (found * left - spurious * missed) / math.sqrt(below) if below else 0.0
    assert matthews(predictions, labels) == pytest.approx(wanted, abs=1e-12)
    assert f1(predictions, labels) == pytest.approx(2 * found / max(2 * found + spurious + missed, 1))
    assert accuracy(predictions, labels) == pytest.approx((found + left) / len(pairs))
    assert -1 <= matthews(predictions, labels) <= 1


@given(NUMBERS)
def test_pearson_agrees_with_exact_arithmetic(pairs):
    x, y = map(list, zip(*pairs, strict=True))
    mean_x, mean_y = Fraction(sum(x), len(x)), Fraction(sum(y), len(y))
    products = sum((a - mean_x) * (b - mean_y) for a, b in pairs)
    squares = sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)
    assert pearson(x, y) == pytest.approx(float(products) / math.sqrt(squares) if squares else 0.0, abs=1e-9)


@given(NUMBERS)
def test_spearman_is_pearson_of_ranks_in_which_ties_share_their_mean(pairs):
    x, y = map(list, zip(*pairs, strict=True))
    ranks = [[sum(o < v for o in values) + (values.count(v) + 1) / 2 for v in values] for values in (x, y)]
    assert spearman(x, y) == pytest.approx(pearson(*ranks), abs=1e-9)


def test_correlations_by_hand():
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson([1.0, 2.0, 3.0], [1.0, 0.0, -1.0]) == pytest.approx(-1)
    assert pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 5)
    assert spearman([1, 2, 3], [1, 10, 1000]) == pytest.approx(1)


@pytest.mark.parametrize("name", [*CLASS_METRICS, *NUMBER_METRICS])
def test_the_order_of_examples_does_not_matter(name):
    metric = {**CLASS_METRICS, **NUMBER_METRICS}[name]
    order = np.random.default_rng(0).permutation(len(WANTED))
    shuffled = metric(np.array(GIVEN)[order], np.array(WANTED)[order])
    assert shuffled == pytest.approx(metric(GIVEN, WANTED))


@pytest.mark.parametrize("metric", [matthews, pearson, spearman])
@pytest.mark.parametrize(
    ("given", "wanted"), [([1, 1, 1], [0, 1, 0]), ([0, 1, 0], [1, 1, 1]), ([1, 1], [1, 1]), ([1], [1])]
)
def test_constant_predictions_or_labels_correlate_with_nothing(metric, given, wanted):
    assert metric(given, wanted) == 0.0


def test_f1_without_class_1_is_0():
    assert f1([0, 0], [0, 0]) == 0.0


@pytest.mark.parametrize("metric", [*CLASS_METRICS.values(), *NUMBER_METRICS.values()])
@pytest.mark.parametrize(("given", "wanted"), [([], []), ([1], [1, 0]), ([[1]], [[1]])])
def test_predictions_without_their_labels_are_refused(metric, given, wanted):
    with pytest.raises(ValueError, match=r"lists of one length"):
        metric(given, wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("metric", NUMBER_METRICS.values())
def test_a_number_that_is_not_finite_is_refused(metric, value):
    with pytest.raises(ValueError, match=f"a prediction is {value}"):
        metric([1.0, value], [1.0, 2.0])
    with pytest.raises(ValueError, match=f"a label is {value}"):
        metric([1.0, 2.0], [1.0, value])


@pytest.mark.parametrize("metric", CLASS_METRICS.values())
def test_numbers_that_are_no_classes_are_refused(metric):
    with pytest.raises(ValueError, match=r"a prediction is .*0\.5.*must be the number of a class"):
        metric([0.5, 1.0], [0, 1])


def test_f1_of_three_classes_is_refused():
    with pytest.raises(ValueError, match="f1 is for the classes 0 and 1, got class 2"):
        f1([0, 1], [2, 1])


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("a cat, an owl and the dog", "cat owl and dog"),
        ("Theatre anthem", "theatre anthem"),
        (" \n", ""),
        ("The", ""),
        ("$1,000.50", "100050"),
    ],
)
def test_answers_are_compared_as_squads_scripts_do(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize("with_no_answer", [False, True])
@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1_score"),
    [
        ("the Red Ball", ["red ball."], 1, 1),
        ("a big red ball", ["red ball", "ball"], 0, 4 / 5),
        ("red", ["blue", "red green", "RED!"], 1, 1),
        ("ball ball", ["ball"], 0, 2 / 3),
        ("green", ["red ball"], 0, 0),
        ("", ["red ball"], 0, 0),
    ],
)
def test_squad_scores_are_the_best_over_the_references(prediction, references, exact, f1_score, with_no_answer):
    assert squad_scores(prediction, references, with_no_answer) == (exact, pytest.approx(f1_score))


@pytest.mark.parametrize(("prediction", "score"), [("", 1), (" The ", 1), ("red", 0)])
def test_the_answer_to_a_question_without_one_is_none(prediction, score):
    assert squad_scores(prediction, [], with_no_answer=True) == (score, score)


def test_where_nothing_is_left_of_a_reference_the_two_scripts_differ():
    assert squad_scores("A", ["A"]) == (1, 0)
    assert squad_scores("A", ["A"], with_no_answer=True) == (1, 1)
    assert squad_scores("A", ["A", "blood type A"]) == (1, 0)
    assert squad_scores("A", ["A", "blood type A"], with_no_answer=True) == (0, 0)


def test_squad_1_has_no_question_without_an_answer():
    with pytest.raises(ValueError, match="with_no_answer"):
        squad_scores("red", [])


def test_rouge_by_hand():
    # Words in common: the, cat, sat, on, mat (of 6 and 7); pairs: the cat, on the (of 5 and 6);
    # longest common subsequence: the cat on the mat.
    scores = rouge_scores("the cat sleeps on the mat", "the cat is sat on the mat")
    assert scores == pytest.approx({"rouge1": 10 / 13, "rouge2": 6 / 11, "rouge_l": 10 / 13})


def test_rouge_compares_stems_and_order():
    assert rouge_scores("Dogs, running!", "dog runs") == pytest.approx({"rouge1": 1, "rouge2": 1, "rouge_l": 1})
    assert rouge_scores("mat the on", "on the mat")["rouge1"] == pytest.approx(1)
    assert rouge_scores("mat the on", "on the mat")["rouge_l"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("prediction", "reference"), [("", "a ball"), ("a ball", ""), ("", ""), ("...", "ball")])
def test_a_summary_without_words_scores_0(prediction, reference):
    assert set(rouge_scores(prediction, reference).values()) == {0.0}


@given(st.lists(st.sampled_from("red ball cat runs".split()), max_size=6).map(" ".join))
def test_a_summary_is_its_own_best(text):
    scores = rouge_scores(text, text)
    assert scores["rouge1"] == scores["rouge_l"] == float(bool(text))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("so $4^2 = \\boxed{16}$.The answer is: 16", "16"),
        ("The answer is: 1,234,567.50.", "1234567.5"),
        ("It costs $18.", "18"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\u22127 degrees", "-7"),
        ("x = -0.25", "-0.25"),
        ("(-3)", "-3"),
        ("Take 10-3", "3"),
        ("f(2)-3", "3"),
        ("n-1", "1"),
        ("half of it, .5", "0.5"),
        ("50% of them", "50"),
        ("**42**", "42"),
        ("5kg and no more", "5"),
        ("3/4", "0.75"),
        ("-1/2", "-0.5"),
        ("5/0", "0"),
        ("1, 2", "2"),
        ("3,14159", "3.14159"),
        ("3,5", "3.5"),
        ("-0,125 m", "-0.125"),
        ("12,50\u20ac", "12.5"),
        ("1234,567", "1234.567"),
        ("1,234", "1234"),
        ("1.234", "1.234"),
        ("1.234,50", "1234.5"),
        ("-1.234.567,8.", "-1234567.8"),
        ("1.234.567", "1234567"),
        ("3, 5", "5"),
        ("1,2,3", "3"),
        ("(1,2,34)", "34"),
        ("1,234, 5", "5"),
        ("12.05.2024", "2024"),
        ("5 234", "5234"),
        ("5\u00a0234", "5234"),
        ("12\u202f345\u202f678,9", "12345678.9"),
        ("1\u2009234.5", "1234.5"),
        ("1'234'567.25", "1234567.25"),
        ("1\u2019234", "1234"),
        ("-5 234/2", "-2617"),
        ("3 5 100", "100"),
        ("5 100 20", "20"),
        ("in 5 2024", "2024"),
        ("first 3\n500", "500"),
        ("\u7b54\u6848\u662f18", "18"),
        ("18 eggs, as x2 says", "18"),
        ("-" + "9" * 5000, "-" + "9" * 5000),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none at all.", "x2", "H2O", "$-.", "a.b"])
def test_a_text_without_a_number_has_no_last_one(text):
    assert final_number(text) is None


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_every_way_to_write_a_number_is_read_as_that_number(value):
    for written in (f"{value:f}", f"{value:,f}", f"{value:f}000."):
        assert final_number(f"After 7 days it is {written}") == value
        assert final_number(f"${written}") == value


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("The answer is: 18.0", "He has 2.\n#### 18", True),
        ("18, not 17", "#### 18", False),
        ("I do not know.", "#### 18", False),
        ("So 18.\n\nQuestion: Ann has 3 balls. How many has she?\nAnswer: 3", "#### 18", True),
        ("So 18.\n### Instruction:\nAdd 2 and 3.", "#### 18", True),
        ("\nQuestion: 18", "#### 18", False),
        ("2,5", "3,5", False),
        ("5 234", "1 234", False),
        ("1.234,50", "1234,5", True),
    ],
)
def test_an_answer_is_right_by_its_last_number_before_another_question(answer, reference, right):
    assert same_final_number(answer, reference) is right


@pytest.mark.parametrize("heading", ["Q:", "Problem 12:", "**Question:**", "## Question 3:", "human:", "User:"])
def test_a_line_that_asks_again_ends_an_answer(heading):
    assert first_answer(f"So 18.\n {heading} 3") == "So 18."


@pytest.mark.parametrize("line", ["#### 18", "## Step 2: 9 + 9 = 18", "The question: is it 18?", "Questions 18"])
def test_other_lines_belong_to_an_answer(line):
    assert first_answer(f"So\n{line}") == f"So\n{line}"
