"""What is measured on held-out data beside the loss: GLUE's, SQuAD's and ROUGE's metrics, and which
generated answers are right.

Pure functions. Those over a whole data set (:data:`CLASS_METRICS`, :data:`NUMBER_METRICS`) want all predictions of all
ranks; the others score one example, so that their mean does not depend on how examples are spread over ranks.
scikit-learn, scipy and rouge-score are imported where they are needed: a command line does not wait for them.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np

from dora_dist.config.tasks import EXACT_MATCH, FINAL_NUMBER
from dora_dist.evaluation.words import RougeTokenizer, spaced

ROUGE_METRICS = {"rouge1": "rouge1", "rouge2": "rouge2", "rouge_l": "rougeL"}
"""Our name of a metric and rouge-score's."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACE = r"[ \u00a0\u2009\u202f]"  # also without a break, thin, and both
_ENDS = r"(?![.,]?\d)"  # or it is part of a list, or of a date
_NUMBER = re.compile(
    r"(?:(?<![A-Za-z\d_)\]}])[$€£]?(?P<minus>[-\u2212])[$€£]?)?"  # a minus behind a number or a name is a difference
    r"(?<![A-Za-z\d_])"  # the 2 of x2 is part of a name
    r"(?:"
    rf"(?P<dots>[1-9]\d{{0,2}}(?:(?:\.\d{{3}})+,\d+|(?:\.\d{{3}}){{2,}}){_ENDS})"
    rf"|(?P<marks>(?<!\d{_SPACE})[1-9]\d{{0,2}}(?P<mark>{_SPACE}|['\u2019])\d{{3}}(?:(?P=mark)\d{{3}})*(?:[.,]\d+)?"
    rf"{_ENDS}(?!{_SPACE}\d))"
    r"|(?P<commas>[1-9]\d{0,2}(?:,\d{3})+(?!\d)(?:\.\d+)?)"
    rf"|(?P<decimal_comma>(?<!\d,)\d+,\d+{_ENDS})"
    r"|(?P<plain>\d+(?:\.\d+)?|\.\d+)"
    r")"
    r"(?:/(?P<divisor>0*[1-9]\d*))?"
)
_NEXT_QUESTION = re.compile(r"\n[\s#*]*(?:question|problem|q|instruction|human|user)\b[ \d]*:", re.IGNORECASE)


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Share of the predictions that are right.

    Args:
        predictions: numbers of classes.
        labels: numbers of the right classes, as many.

    Raises:
        ValueError: there are none, or not as many of both.
    """
    predicted, wanted = _classes(predictions, labels)
    return float(np.mean(predicted == wanted))


def matthews(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Matthews correlation coefficient, for two classes or more, in [-1, 1]; 0 where all predictions are alike, or all
    labels, which then say nothing about each other. Arguments and errors are those of :func:`accuracy`."""
    from sklearn.metrics import matthews_corrcoef

    predicted, wanted = _classes(predictions, labels)
    if np.ptp(predicted) == 0 or np.ptp(wanted) == 0:
        return 0.0
    return float(np.clip(matthews_corrcoef(wanted, predicted), -1, 1))


def f1(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """F1 of class 1 of two, as GLUE has it for MRPC and QQP; 0 where class 1 is neither predicted nor wanted.

    Raises:
        ValueError: there are other classes than 0 and 1; and see :func:`accuracy`.
    """
    from sklearn.metrics import f1_score

    predicted, wanted = _classes(predictions, labels)
    if others := sorted(set(np.concatenate([predicted, wanted]).tolist()) - {0, 1}):
        raise ValueError(f"f1 is for the classes 0 and 1, got class {others[0]}: measure accuracy or matthews")
    return float(f1_score(wanted, predicted, zero_division=0.0))


def pearson(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Pearson's linear correlation coefficient, in [-1, 1]; 0 where all predictions are alike, or all labels.

    scipy gives no number there; a model that has learned nothing yet should not look like a broken run.

    Args:
        predictions: finite numbers.
        labels: the right numbers, finite and as many.

    Raises:
        ValueError: there are none, not as many of both, or one is not finite.
    """
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def spearman(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Spearman's rank correlation coefficient, equal values sharing their mean rank; otherwise as :func:`pearson`."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, labels)


CLASS_METRICS: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "f1": f1,
}
NUMBER_METRICS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "pearson": pearson,
    "spearman": spearman,
}


def _classes(predictions: Sequence[int], labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    predicted, wanted = _same_shape(predictions, labels)
    for name, values in (("prediction", predicted), ("label", wanted)):
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"a {name} is {values[0]!r}, but must be the number of a class (an integer)")
    return predicted, wanted


def _correlation(measure: Callable[..., Any], predictions: Sequence[float], labels: Sequence[float]) -> float:
    predicted, wanted = (values.astype(np.float64) for values in _same_shape(predictions, labels))
    for name, values in (("prediction", predicted), ("label", wanted)):
        if not np.isfinite(values).all():
            raise ValueError(f"a {name} is {values[~np.isfinite(values)][0]}, of which there is no correlation")
    if np.ptp(predicted) == 0 or np.ptp(wanted) == 0:
        return 0.0
    return float(np.clip(measure(predicted, wanted).statistic, -1, 1))


def _same_shape(predictions: Sequence[float], labels: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    predicted, wanted = np.asarray(predictions), np.asarray(labels)
    if predicted.ndim != 1 or predicted.shape != wanted.shape or not len(predicted):
        raise ValueError(
            f"predictions have shape {predicted.shape} and labels {wanted.shape}, but both must be lists of one "
            "length, of at least 1"
        )
    return predicted, wanted


def normalize_answer(text: str) -> str:
    """An answer as SQuAD's official scripts compare it: lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_scores(prediction: str, references: Sequence[str], with_no_answer: bool = False) -> tuple[float, float]:
    """Exact match and F1 of one answer, each the best over the references, in [0, 1].

    F1 is over words, as multisets; in writing without spaces between words it is over characters, which the official
    scripts do not do. With ``with_no_answer`` as the script of SQuAD v2: the right answer to a question
    without references is the empty one, references of which nothing is left are passed over, and an empty answer
    (nothing left of it) has F1 1 where it is right and 0 elsewhere. Without, as the script of v1.1.

    Args:
        prediction: the answer that was given; empty for none.
        references: answers that count as right.
        with_no_answer: whether a question may have none.

    Raises:
        ValueError: there are no references, though every question has an answer.
    """
    given = normalize_answer(prediction)
    wanted = [normalize_answer(reference) for reference in references]
    if with_no_answer:
        wanted = [reference for reference in wanted if reference] or [""]
    if not wanted:
        raise ValueError("a question has no answer, which is not of SQuAD v1.1: measure it with with_no_answer")
    scores = [(float(given == reference), _word_f1(given, reference, with_no_answer)) for reference in wanted]
    exact_matches, f1_scores = zip(*scores, strict=True)
    return max(exact_matches), max(f1_scores)


def _word_f1(given: str, wanted: str, with_no_answer: bool) -> float:
    if with_no_answer and not (given and wanted):
        return float(given == wanted)
    given_words, wanted_words = spaced(given).split(), spaced(wanted).split()
    common = (Counter(given_words) & Counter(wanted_words)).total()
    if not common:
        return 0.0
    precision, recall = common / len(given_words), common / len(wanted_words)
    return 2 * precision * recall / (precision + recall)


def rouge_scores(prediction: str, reference: str) -> dict[str, float]:
    """:data:`ROUGE_METRICS` of one summary: F-measures in [0, 1], over :class:`RougeTokenizer`'s words."""
    scores = _rouge_scorer().score(reference, prediction)
    return {name: float(scores[theirs].fmeasure) for name, theirs in ROUGE_METRICS.items()}


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE_METRICS.values()), tokenizer=RougeTokenizer())


def final_number(text: str) -> Decimal | None:
    """The last number in a text; None where there is none.

    ``-1,234.50``, ``$18``, ``-$5``, ``.5``, ``50%`` (50) and ``3/4`` are numbers. So are ``3,5`` and ``0,125`` with a
    decimal comma, ``1.234,50`` and ``1.234.567``, and thousands behind spaces or apostrophes (``5 234``, ``5'234``).
    What can be read in two ways is read as English: ``1,234`` is 1234, and ``1.234`` has decimals. ``1,2,3`` and
    ``3, 5`` are lists. A sign directly behind a number or a name is a difference (``10-3`` ends in 3), and digits
    behind a letter belong to a name (``x2``). LaTeX and powers of ten are not understood.
    """
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    value = Decimal(_in_digits_and_point(last))
    if last["divisor"] is not None:
        value /= Decimal(last["divisor"])
    return value.copy_negate() if last["minus"] else value


def _in_digits_and_point(number: re.Match[str]) -> str:
    """A match of :data:`_NUMBER`, without its sign and its divisor, as Python writes numbers."""
    if number["dots"]:
        return number["dots"].replace(".", "").replace(",", ".")
    if number["commas"]:
        return number["commas"].replace(",", "")
    if number["marks"]:
        return number["marks"].replace(number["mark"], "").replace(",", ".")
    return (number["decimal_comma"] or number["plain"]).replace(",", ".")


def first_answer(text: str) -> str:
    """A generated answer without what follows it: a model that has not learned to stop goes on with another question.

    That question begins with a line that starts with ``Question:``, ``Problem 2:``, ``Q:``, ``Instruction:``,
    ``Human:`` or ``User:``, in capitals or not, perhaps behind ``#`` or ``*``.
    """
    return _NEXT_QUESTION.split(text, maxsplit=1)[0]


def same_text(answer: str, reference: str) -> bool:
    """Whether both are equal, white space around them apart."""
    return answer.strip() == reference.strip()


def same_final_number(answer: str, reference: str) -> bool:
    """Whether the last number of :func:`first_answer` is that of the reference, which has one; 18 is 18.0."""
    return final_number(first_answer(answer)) == final_number(reference)


ANSWER_METRICS: dict[str, Callable[[str, str], bool]] = {EXACT_MATCH: same_text, FINAL_NUMBER: same_final_number}
"""Name of a metric -> whether a generated answer is right, given the answer and the reference."""
