"""Question answering and summaries through the entry point's ``main``, on two real ranks under ZeRO-2."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.forked_run import log_of, run_to_the_end, start_run
from support.ranks import wait_for_ranks
from support.same_run import assert_invariant, assert_same_run, evaluation_of, stopped_at
from support.tiny_encoders import save_tiny_encoder, write_questions, write_summaries
from transformers import AutoModelForQuestionAnswering, AutoModelForSeq2SeqLM, AutoTokenizer

from dora_dist.evaluation.evaluator import NUM_SHOWN
from dora_dist.evaluation.metrics import rouge_scores, squad_scores
from dora_dist.runs.records import read_answers

WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """A finished run; returns its configuration."""
    folder = tmp_path_factory.mktemp("questions")
    config = write_questions(folder, unanswerable=True)
    output = run_to_the_end(config, folder / "run", folder / "log")
    assert "exact match" in output
    assert "F1" in output
    return config


@pytest.fixture(scope="module")
def summaries(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("summaries")
    config = write_summaries(folder, training={"learning_rate": 3e-2})
    output = run_to_the_end(config, folder / "run", folder / "log")
    assert "ROUGE-L" in output
    return config


def held_out(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]


@torch.no_grad()
def test_stock_peft_answers_as_measured(questions):
    """By the definition, without this program's code for windows and answers: the best span of any window."""
    folder = questions.parent
    summary = json.loads((folder / "run" / "summary.json").read_text())["after"]
    base = AutoModelForQuestionAnswering.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(base, folder / "run" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "adapter")
    scores, several = [], 0
    for row in held_out(folder):
        encoded = tokenizer(
            row["question"],
            row["context"],
            truncation="only_second",
            max_length=24,
            stride=6,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        several += len(encoded["input_ids"]) > 1
        best, answer, null = -float("inf"), "", float("inf")
        for number, offsets in enumerate(encoded["offset_mapping"]):
            inputs = {name: torch.tensor([encoded[name][number]]) for name in tokenizer.model_input_names}
            outputs = model(**inputs)
            start, end = outputs.start_logits[0], outputs.end_logits[0]
            null = min(null, float(start[0].double() + end[0].double()))
            inside = [n for n, text in enumerate(encoded.sequence_ids(number)) if text == 1]
            for first in inside:
                for last in inside:
                    score = float(start[first].double() + end[last].double())
                    if first <= last and score > best:
                        best, answer = score, row["context"][offsets[first][0] : offsets[last][1]]
        answer = "" if null > best else answer
        scores.append(squad_scores(answer, row["answers"]["text"], with_no_answer=True))
    assert several, "no context was longer than a window"
    assert summary["examples"] == len(scores) == 9
    assert summary["exact_match"] == pytest.approx(sum(exact for exact, _ in scores) / 9)
    assert summary["f1"] == pytest.approx(sum(f1 for _, f1 in scores) / 9)


@torch.no_grad()
def test_stock_peft_writes_the_summaries_that_were_measured(summaries):
    folder = summaries.parent
    summary = json.loads((folder / "run" / "summary.json").read_text())["after"]
    base = AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
    assert base.generation_config.forced_eos_token_id == 2, "a setting of the base, which does not act in a run"
    base.generation_config.forced_eos_token_id = None
    model = PeftModel.from_pretrained(base, folder / "run" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "adapter")
    losses, tokens, scores, written = 0.0, 0, [], []
    for row in held_out(folder):
        inputs = tokenizer(row["document"], return_tensors="pt", return_token_type_ids=False)
        labels = tokenizer(text_target=row["summary"], return_tensors="pt")["input_ids"]
        losses += float(model(**inputs, labels=labels).loss) * labels.numel()
        tokens += labels.numel()
        output = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=8)
        written.append(tokenizer.decode(output[0], skip_special_tokens=True))
        scores.append(rouge_scores(written[-1], row["summary"]))
    assert summary["loss"] == pytest.approx(losses / tokens, rel=1e-4)
    assert summary["rouge1"] > 0
    for name in ("rouge1", "rouge2", "rouge_l"):
        assert summary[name] == pytest.approx(sum(score[name] for score in scores) / 9)
    recorded = read_answers(folder / "run")[-NUM_SHOWN:]
    assert [line["answer"] for line in recorded] == written[:NUM_SHOWN]
    assert [line["reference"] for line in recorded] == [row["summary"] for row in held_out(folder)[:NUM_SHOWN]]
    saved = json.loads((folder / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_2_SEQ_LM"
    assert saved["modules_to_save"] is None


@pytest.mark.parametrize("kind", ["questions", pytest.param("summaries", marks=pytest.mark.full("tasks"))])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(kind, request, tmp_path):
    config = request.getfixturevalue(kind)
    resumed = stopped_at(5, config.parent / "run", tmp_path)
    wait_for_ranks(start_run(config, resumed, tmp_path / "log"), timeout=120)
    assert f"resuming from {resumed}/checkpoint-5" in log_of(tmp_path / "log")
    assert_same_run(config.parent / "run", resumed)


@pytest.mark.full("tasks")
def test_the_course_of_question_answering_does_not_depend_on_ranks_or_accumulation(tmp_path):
    config = write_questions(tmp_path)
    save_tiny_encoder(tmp_path / "model", **WITHOUT_DROPOUT)
    assert_invariant(config, tmp_path, ("exact_match", "f1"))


@pytest.mark.full("tasks")
@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_the_course_of_summaries_does_not_depend_on_ranks_or_accumulation(architecture, tmp_path):
    config = write_summaries(tmp_path, architecture, evaluation={"num_beams": 2})
    assert_invariant(config, tmp_path, ("rouge1",))


@pytest.mark.full("tasks")
def test_questions_are_counted_and_not_windows(questions, tmp_path):
    """Also where only some of them are evaluated."""
    options = ("--evaluation.max_examples", "4", "--training.max_steps", "8")
    run_to_the_end(questions, tmp_path / "run", tmp_path / "log", *options)
    assert evaluation_of(tmp_path / "run")["eval_examples"] == 4
