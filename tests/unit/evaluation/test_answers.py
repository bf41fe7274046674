"""Generated answers and their figures, of a model that says nothing but numbers."""

import pytest
import torch
from datasets import Dataset
from support.tiny_models import VOCABULARY, adapt, tiny_model
from support.tiny_tokenizer import word_tokenizer

from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.out_of_memory import NoMemoryLeftError
from dora_dist.evaluation.answers import AnswerEvaluator, generate_answers
from dora_dist.evaluation.evaluator import MOST_CHARACTERS, NUM_SHOWN, ShownAnswer
from dora_dist.evaluation.metrics import final_number

PROMPTS = [[1, first, second] for first, second in ((7, 8), (9, 10), (20, 30), (31, 44), (50, 60))]
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def tokenizer():
    """All of whose words are numbers."""
    return word_tokenizer(" ".join(f"{number}" for number in range(100, 100 + VOCABULARY)))


@pytest.fixture(scope="module")
def model():
    return adapt(tiny_model(max_position_embeddings=16))


def evaluator(tokenizer, answers: list[str], *metrics: str) -> AnswerEvaluator:
    rows = [
        {"input_ids": [*prompt, 5], "spans": [3, 4], "answer_start": 3, "answer": a}
        for prompt, a in zip(PROMPTS, answers, strict=True)
    ]
    return AnswerEvaluator(
        sources={"eval": Dataset.from_list(rows)},
        agreement=Agreement(),
        batch_size=2,
        tokenizer=tokenizer,
        metrics=metrics,
        max_new_tokens=NEW_TOKENS,
        stop=[2],
    )


def test_right_answers_are_counted_by_every_metric_that_is_asked_for(tokenizer, model):
    said = [generate_answers(model, tokenizer, [prompt], NEW_TOKENS, [2])[0] for prompt in PROMPTS]
    last = [final_number(answer) for answer in said]
    assert None not in last
    references = [f" {said[0]}\n", f"In all {last[1]}.00", f"${last[2]}.", f"{last[3] + 1}", f"-{last[4]}"]
    figures = evaluator(tokenizer, references, "exact_match", "final_number")(model)
    assert (figures["exact_match"], figures["final_number"], figures["examples"]) == (1 / 5, 3 / 5, 5)
    only = evaluator(tokenizer, references, "final_number")(model)
    assert only == {name: value for name, value in figures.items() if name != "exact_match"}


def test_an_answer_ends_where_the_positions_of_the_model_do(tokenizer, model):
    """Its text is that of a longer context up to there, beside a short prompt as alone."""
    long, short = [1, *range(10, 23)], PROMPTS[0]  # 14 of 16 positions
    answers = generate_answers(model, tokenizer, [long, short], 6, [2])
    assert answers == [generate_answers(model, tokenizer, [prompt], 6, [2])[0] for prompt in (long, short)]
    assert [len(answer.split()) for answer in answers] == [2, 6]
    roomy = adapt(tiny_model(max_position_embeddings=64))
    assert generate_answers(roomy, tokenizer, [long], 6, [2])[0].split()[:2] == answers[0].split()


def test_without_metrics_nothing_is_generated(tokenizer, model, monkeypatch):
    monkeypatch.setattr(type(model), "generate", None)
    measured = evaluator(tokenizer, ["1"] * 5)
    assert set(measured(model)) == {"loss", "examples"}
    assert measured.shown == {"eval": []}


def test_the_first_answers_are_kept_to_look_at_in_the_order_of_the_examples(tokenizer, model):
    said = [generate_answers(model, tokenizer, [prompt], NEW_TOKENS, [2])[0] for prompt in PROMPTS]
    measured = evaluator(tokenizer, ["1", "2", "3", "4" * 2001, "5"], "exact_match")
    for _ in range(2):
        measured(model)
        shown = measured.shown["eval"]
        assert [(one.number, one.answer) for one in shown] == list(enumerate(said[:NUM_SHOWN]))
        assert [one.prompt for one in shown] == [tokenizer.decode(p, skip_special_tokens=True) for p in PROMPTS[:4]]
        assert [one.reference for one in shown[:3]] == ["1", "2", "3"]
        assert shown[3].reference == "4" * 2000 + " [... 1 more characters]"


def test_of_a_long_prompt_the_end_is_kept_which_the_answer_is_to():
    shown = ShownAnswer.of(0, "a" * 5 + "b" * MOST_CHARACTERS, "c" * (MOST_CHARACTERS + 5), "d")
    assert shown.prompt == "[5 more characters ...] " + "b" * MOST_CHARACTERS
    assert shown.reference == "c" * MOST_CHARACTERS + " [... 5 more characters]"


def test_the_figures_of_batches_are_those_of_all_their_examples(tokenizer):
    measured = evaluator(tokenizer, ["1"] * 5, "exact_match", "final_number")
    outcomes = [(0, 2.0, 4, 3, (1, 2), []), (3, 1.0, 2, 1, (0, 1), [])]
    assert measured.figures(outcomes) == {"loss": 0.5, "examples": 4, "exact_match": 1 / 4, "final_number": 3 / 4}


@pytest.mark.parametrize(
    ("error", "shown", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), NoMemoryLeftError, "^no memory left in an evaluation: lower "),
        (KeyError("no such column"), KeyError, "^'no such column'$"),
    ],
)
def test_an_error_says_what_to_lower_or_stays_what_it_is(tokenizer, model, error, shown, message):
    def fail(*_):
        raise error

    hook = model.get_base_model().model.layers[0].register_forward_pre_hook(fail)
    was_training = model.training
    with pytest.raises(shown, match=message) as raised:
        evaluator(tokenizer, ["1"] * 5)(model.train())
    hook.remove()
    assert model.training
    assert str(raised.value).count("no memory left") == (shown is NoMemoryLeftError)
    model.train(was_training)
