"""One model in memory that answers with its adapter switched off and on."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dora_dist.base_model.shape import input_embedding, positions_of
from dora_dist.config.checks import require
from dora_dist.data.encoding.chat import stop_tokens
from dora_dist.data.encoding.control_tokens import ControlTokens, control_tokens
from dora_dist.evaluation.answers import generate_answers
from dora_dist.generate.questions import PromptRequest
from dora_dist.generate.sampling import Sampling
from dora_dist.routing.loading import load_trained
from dora_dist.runs.trained_run import TrainedRun


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """What answers the questions of a run.

    Attributes:
        trained: the run.
        tokenizer: the tokenizer of its adapter.
        controls: what becomes of control tokens in texts.
        sampling: how the next token is chosen.
        max_new_tokens: longest answer, in tokens.
        stop: tokens that end an answer.
        context: number of tokens of prompt and answer that the model has positions for; None without a bound.
    """

    trained: TrainedRun
    tokenizer: PreTrainedTokenizerBase
    controls: ControlTokens
    sampling: Sampling
    max_new_tokens: int
    stop: Sequence[int]
    context: int | None

    @classmethod
    def of(cls, trained: TrainedRun, sampling: Sampling, max_new_tokens: int | None) -> "Answerer":
        """An answerer without its model, which :meth:`load` reads when all else is known to be sound.

        Args:
            trained: the run.
            sampling: how the next token is chosen.
            max_new_tokens: longest answer, in tokens; None for that of the run's evaluations.
        """
        tokenizer = trained.load_tokenizer()
        context = positions_of(trained.load_model_config())
        if max_new_tokens is not None and context is not None:
            rule = f"be at most {context}, the model's context in tokens, which holds prompt and answer"
            require(max_new_tokens <= context, "--max-new-tokens", max_new_tokens, rule)
        return cls(
            trained=trained,
            tokenizer=tokenizer,
            controls=control_tokens(tokenizer, trained.use.control_tokens),
            sampling=sampling,
            max_new_tokens=max_new_tokens or trained.use.max_new_tokens,
            stop=stop_tokens(tokenizer, tokenizer.get_chat_template() if trained.use.chat else None),
            context=context,
        )

    def load(self) -> PeftModel:
        """The base with the adapter."""
        return load_trained(self.trained)

    def ids(self, question: PromptRequest) -> list[int]:
        """Token ids of what is asked, as in training.

        Raises:
            ValueError: a text holds a control token that training would have refused.
        """
        return question.ids(self.tokenizer, self.trained.use.chat, self.controls)

    def prompt(self, question: PromptRequest) -> str:
        """What is asked, as text."""
        return question.prompt(self.tokenizer, self.trained.use.chat)

    def answers(self, model: PeftModel, prompts: list[list[int]], turn: int, **options: Any) -> list[str]:
        """Answers to the prompts of one batch, which are the same for the same seed, batch and turn.

        Raises:
            ValueError: the model's embedding has no row for one of their tokens.
        """
        base, highest = model.get_base_model(), max(map(max, prompts))
        assert isinstance(base, PreTrainedModel)
        rows = len(input_embedding(base).weight)  # PEFT's wrapper for rows of new tokens has its weight alone
        if highest >= rows:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise ValueError(
                f"a prompt has the token {token!r} ({highest}), for which the embedding of {self.trained.base}, of "
                f"{rows} rows, has none: give the base that the adapter was trained on with --model.path"
            )
        self.sampling.begin(turn)
        options = {**self.sampling.options(), **options}
        return generate_answers(model, self.tokenizer, prompts, self.max_new_tokens, self.stop, options)


def answer_twice(
    answerer: Answerer, questions: Iterable[PromptRequest], batch_size: int = 1
) -> Iterator[tuple[str, str, str]]:
    """Prompt, answer of the base, answer of the adapter.

    Args:
        answerer: the run's answerer.
        questions: what is asked.
        batch_size: number of prompts that are answered at a time, padded on the left.
    """
    asked: Iterable[tuple[PromptRequest, list[int]]]
    asked = ((question, _with_room(answerer.ids(question), answerer.context)) for question in questions)
    if isinstance(questions, list):  # all is checked before the model is read, except what is typed line by line
        asked = list(asked)
    model = answerer.load()
    remaining, turn = iter(asked), 0
    while batch := list(itertools.islice(remaining, batch_size)):
        prompts = [ids for _, ids in batch]
        with model.disable_adapter():
            before = answerer.answers(model, prompts, turn)
        after = answerer.answers(model, prompts, turn)
        turn += 1
        for (question, _), base, adapted in zip(batch, before, after, strict=True):
            yield answerer.prompt(question), base, adapted


def _with_room(ids: list[int], context: int | None) -> list[int]:
    if context is not None and len(ids) >= context:
        raise ValueError(
            f"a prompt has {len(ids)} tokens, which leave no room for an answer in the model's context of {context}: "
            "ask with less text"
        )
    return ids
