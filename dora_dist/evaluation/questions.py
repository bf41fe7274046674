"""Held-out loss, exact match and F1 of extractive question answering, the same numbers on any number of ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from datasets import Dataset
from tqdm import tqdm

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.losses import span_losses
from dora_dist.data.batches import ANSWER_SPANS, LabelledCollator
from dora_dist.data.encoding.questions import ScoredWindow, best_answer, scored_window
from dora_dist.evaluation.evaluator import OutcomeEvaluator, chunks
from dora_dist.evaluation.metrics import squad_scores

Outcome = tuple[int, float, int, float, float]
"""Of one question: index of its first window, sum of the windows' losses, windows, exact match, F1."""


@dataclass(frozen=True, kw_only=True)
class QuestionEvaluator(OutcomeEvaluator):
    """Of a model with start and end logits. The loss is the mean over all windows, the metrics over all questions, each
    of which is answered from all its windows.

    Args:
        collate: makes the batches.
        metrics: of ``exact_match`` and ``f1``.
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
    places = examples.data.column("place").to_pylist()
    starts = [number for number, place in enumerate(places) if number == 0 or place != places[number - 1]]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(places)], strict=True)]


def first_questions(examples: Dataset, most: int) -> Dataset:
    """The windows of the first ``most`` questions, all of each."""
    questions = questions_of(examples)[:most]
    return examples.take(questions[-1].stop)
