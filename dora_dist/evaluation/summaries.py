"""Held-out loss and ROUGE of generated summaries, the same numbers on any number of ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.base_model.losses import token_losses
from dora_dist.data.batches import TARGETS, TargetCollator
from dora_dist.data.encoding.encoder import IGNORED
from dora_dist.evaluation.evaluator import NUM_SHOWN, Evaluator, ShownAnswer
from dora_dist.evaluation.generation import generate
from dora_dist.evaluation.metrics import rouge_scores

Outcome = tuple[int, float, int, dict[str, float], ShownAnswer | None]
"""Outcome of one document: its index, sum of the losses, number of tokens of its summary, scores of the generated
summary, and for the first documents that summary to look at."""


@dataclass(frozen=True, kw_only=True)
class SummaryEvaluator(Evaluator):
    """Measures a model with an encoder and a decoder. The loss is the mean over all tokens of the summaries, ROUGE that
    over the documents, of what the model writes by itself against the whole reference.

    Args:
        tokenizer: the model's.
        collate: makes the batches.
        metrics: names of what :func:`~dora_dist.evaluation.metrics.rouge_scores` returns; for none, nothing is
            generated.
        max_new_tokens: longest generated summary, in tokens.
        num_beams: number of beams; 1 is greedy.
    """

    tokenizer: PreTrainedTokenizerBase
    collate: TargetCollator
    metrics: Sequence[str]
    max_new_tokens: int
    num_beams: int

    def measure(self, model: DynamicLoraModel, examples: Dataset, share: list[range], progress: tqdm) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for indices in share:
            rows = [examples[index] for index in indices]
            batch = self.collate([[TARGETS.read({name: row[name] for name in TARGETS.columns})] for row in rows])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            losses = token_losses(model(**batch), labels).double().sum(1).tolist()
            tokens = (labels != IGNORED).sum(1).tolist()
            written = self._generate(model, batch) if self.metrics else [""] * len(rows)
            scores = [
                rouge_scores(text, row["answer"]) if self.metrics else {}
                for text, row in zip(written, rows, strict=True)
            ]
            shown = [self._shown(*one) for one in zip(indices, rows, written, strict=True)]
            outcomes += zip(indices, losses, tokens, scores, shown, strict=True)
            progress.update(len(indices))
        return outcomes

    def _shown(self, index: int, row: Mapping[str, Any], text: str) -> ShownAnswer | None:
        if not self.metrics or index >= NUM_SHOWN:
            return None
        document = str(self.tokenizer.decode(row["input_ids"], skip_special_tokens=True))
        return ShownAnswer.of(index, document, row["answer"], text)

    def _generate(self, model: DynamicLoraModel, batch: dict[str, Any]) -> list[str]:
        output = generate(
            model,
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            num_beams=self.num_beams,
            use_cache=True,
            max_new_tokens=self.max_new_tokens,
        )
        texts: list[str] = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return texts

    def figures(self, part: list[Outcome]) -> dict[str, float]:
        _, losses, tokens, scores, _ = zip(*part, strict=True)
        means = {name: math.fsum(one[name] for one in scores) / len(part) for name in self.metrics}
        return {"loss": math.fsum(losses) / sum(tokens), "examples": len(part), **means}

    def shown_of(self, part: list[Outcome]) -> list[ShownAnswer]:
        return [shown for *_, shown in part if shown is not None]
