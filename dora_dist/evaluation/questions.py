"""Held-out loss, exact match and F1 of extractive question answering, the same numbers on any number of ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.losses import span_losses
from dora_dist.data.batches import ANSWER_SPANS, LabelledCollator
from dora_dist.evaluation.evaluator import Evaluator, chunks
from dora_dist.evaluation.metrics import squad_scores

Outcome = tuple[int, float, int, float, float]
"""Outcome of one question: index of its first window, sum of the windows' losses, their number, exact match, F1."""


@dataclass(frozen=True, kw_only=True)
class QuestionEvaluator(Evaluator):
    """Measures a model with start and end logits. The loss is the mean over all windows, the metrics are means over all
    questions, each of which is answered from all its windows.

    Args:
        collate: makes the batches.
        metrics: names among ``exact_match`` and ``f1``.
        with_no_answer: whether some questions have no answer, as in SQuAD v2, so that an empty one may be given.
    """

    collate: LabelledCollator
    metrics: Sequence[str]
    with_no_answer: bool

    def share(self, examples: Dataset) -> list[range]:
        """Whole questions, of at least a batch of windows together; which ones does not depend on the ranks."""
        groups, start = [], 0
        for question in questions_of(examples):
            if question.stop - start >= self.batch_size:
                groups.append(range(start, question.stop))
                start = question.stop
        if start < len(examples):
            groups.append(range(start, len(examples)))
        return groups[self.agreement.rank :: self.agreement.size]

    def measure(self, model: DynamicLoraModel, examples: Dataset, share: list[range], progress: tqdm) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for group in share:
            rows = [examples[index] for index in group]
            losses: list[float] = []
            windows: list[ScoredWindow] = []
            for part in chunks(range(len(rows)), self.batch_size):
                batch = self.collate([[ANSWER_SPANS.read(rows[number])] for number in part])
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                outputs = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
                losses += span_losses(outputs, batch).double().tolist()
                logits = zip(outputs.start_logits.tolist(), outputs.end_logits.tolist(), strict=True)
                windows += [scored_window(rows[number], *both) for number, both in zip(part, logits, strict=True)]
            for _, numbers in groupby(range(len(rows)), key=lambda number: rows[number]["place"]):
                asked = list(numbers)
                row = rows[asked[0]]
                threshold = 0.0 if self.with_no_answer else None
                answer = best_answer(row["context"], [windows[n] for n in asked], null_threshold=threshold)
                scores = squad_scores(answer, row["answers"], self.with_no_answer)
                outcomes.append((group[asked[0]], math.fsum(losses[n] for n in asked), len(asked), *scores))
            progress.update(len(group))
        return outcomes

    def figures(self, part: list[Outcome]) -> dict[str, float]:
        _, losses, windows, exact_matches, f1_scores = zip(*part, strict=True)
        means = {"exact_match": math.fsum(exact_matches) / len(part), "f1": math.fsum(f1_scores) / len(part)}
        return {
            "loss": math.fsum(losses) / sum(windows),
            "examples": len(part),
            **{name: means[name] for name in self.metrics},
        }


def questions_of(examples: Dataset) -> list[range]:
    """The windows of every question, which stand one after the other."""
    places = examples["place"][:]
    starts = [number for number, place in enumerate(places) if number == 0 or place != places[number - 1]]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(places)], strict=True)]


def first_questions(examples: Dataset, most: int) -> Dataset:
    """The windows of the first ``most`` questions, all of each."""
    questions = questions_of(examples)[:most]
    return examples.take(questions[-1].stop)


MAX_ANSWER_TOKENS = 30


def scored_window(row: Mapping[str, Any], start_logits: Sequence[float], end_logits: Sequence[float]) -> "ScoredWindow":
    """The window of a row of :class:`~dora_dist.data.encoding.questions.QuestionEncoder` with a model's logits."""
    flat = row["offsets"]
    return ScoredWindow(list(zip(flat[::2], flat[1::2], strict=True)), row["null"], start_logits, end_logits)


@dataclass(frozen=True, slots=True)
class ScoredWindow:
    """One window with a model's logits.

    Attributes:
        offsets: see :class:`~dora_dist.data.encoding.questions.Window`.
        null: position of the token that stands for no answer.
        start_logits: logit of every position to be the answer's first token; there may be more of them than offsets,
            for padding on the right.
        end_logits: logit of every position to be its last token.
    """

    offsets: Sequence[tuple[int, int]]
    null: int
    start_logits: Sequence[float]
    end_logits: Sequence[float]


def best_answer(
    context: str,
    windows: Sequence[ScoredWindow],
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    null_threshold: float | None = None,
) -> str:
    """The answer with the highest sum of start and end logit, over all spans of all windows of a question.

    All spans are compared; the usual lists of the 20 best starts and ends approximate this. The first one wins where
    several are equal. Tokens of nothing but white space neither begin nor end an answer.

    Args:
        context: the question's context.
        windows: all windows of the question.
        max_answer_tokens: longest answer, in tokens.
        null_threshold: difference of scores above which the answer is empty, 0 in SQuAD v2: the score of no answer
            (both logits of :attr:`ScoredWindow.null`, the lowest over the windows) less that of the best answer. None
            where every question has an answer.

    Raises:
        ValueError: there are no windows, too few logits for one, or some that are not finite.
    """
    if not windows:
        raise ValueError("a question has no windows to find an answer in")
    best, answer, null_score = -np.inf, "", np.inf
    for window in windows:
        starts, ends = _logits(window.start_logits, window), _logits(window.end_logits, window)
        null_score = min(null_score, float(starts[window.null] + ends[window.null]))
        able = np.array([a >= 0 and bool(context[a:b].strip()) for a, b in window.offsets])
        scores = np.where(able, starts, -np.inf)[:, None] + np.where(able, ends, -np.inf)[None, :]
        number = np.arange(len(able))
        length = number[None, :] - number[:, None] + 1
        scores[(length < 1) | (length > max_answer_tokens)] = -np.inf
        start, end = divmod(int(np.argmax(scores)), len(able))
        if scores[start, end] > best:
            best = float(scores[start, end])
            answer = context[window.offsets[start][0] : window.offsets[end][1]].strip()
    return "" if null_threshold is not None and null_score - best > null_threshold else answer


def _logits(values: Sequence[float], window: ScoredWindow) -> np.ndarray:
    logits = np.asarray(values, dtype=np.float64)
    if logits.ndim != 1 or len(logits) < len(window.offsets):
        raise ValueError(f"logits have shape {logits.shape}, but the window has {len(window.offsets)} tokens")
    logits = logits[: len(window.offsets)]
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite, so that no answer is the best")
    return logits
