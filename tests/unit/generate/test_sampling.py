"""What is drawn, how many prompts are answered at a time, and conversations."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from support.trained_run import TrainedFolder, character_tokenizer, make_base, make_run

from dora_dist.console import files
from dora_dist.data.encoding.chat import choose_template
from dora_dist.generate import __main__ as command
from dora_dist.generate import answering
from dora_dist.generate.answering import Answerer
from dora_dist.generate.conversing import converse
from dora_dist.generate.questions import PromptRequest, collect_questions, read_questions
from dora_dist.generate.sampling import Sampling
from dora_dist.runs import records
from dora_dist.runs.trained_run import open_run


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolder:
    """A run that was trained in a chat template."""
    folder = tmp_path_factory.mktemp("chatting")
    made = make_run(folder / "run", make_base(folder / "base"))
    tokenizer = character_tokenizer()
    tokenizer.chat_template = choose_template(tokenizer, "plain").text
    tokenizer.save_pretrained(made.folder / "adapter")
    about = made.folder / records.RUN
    files.write_json(about, {**files.read_json(about), "data": {"chat": True, "train": [{"format": "messages"}]}})
    return made


def generated(run: TrainedFolder, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    command.main([str(run.folder), "--max-new-tokens", "8", *options])
    return capsys.readouterr().out


def test_answers_in_batches_are_those_one_by_one(run: TrainedFolder, tmp_path: Path, capsys) -> None:
    """Greedy, in float32, with prompts of several lengths, which are padded on the left."""
    rows = ["Say it.", {"instruction": "And this", "input": "x" * 40}, {"prompt": "as it is"}, "a", "the last one"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    one_by_one = generated(run, capsys, "--file", str(file))
    assert one_by_one.count("--- adapter\n") == len(rows)
    for size in ("2", "5"):
        assert generated(run, capsys, "--file", str(file), "--batch-size", size) == one_by_one


def test_what_is_drawn_follows_from_the_seed(run: TrainedFolder, capsys) -> None:
    drawn = {
        seed: generated(run, capsys, "--prompt", "a", "b", "--temperature", "2", "--seed", seed) for seed in ("0", "1")
    }
    assert drawn["0"] != drawn["1"]
    assert generated(run, capsys, "--prompt", "a", "b", "--temperature", "2") == drawn["0"]


@pytest.mark.parametrize("cut", [("--top-k", "1"), ("--top-p", "1e-9")])
def test_a_cut_to_the_most_likely_token_is_greedy(run: TrainedFolder, capsys, cut: tuple[str, str]) -> None:
    greedy = generated(run, capsys, "--prompt", "a")
    assert generated(run, capsys, "--prompt", "a", "--temperature", "5", *cut) == greedy
    assert generated(run, capsys, "--prompt", "a", "--temperature", "5") != greedy


def test_tokens_come_as_often_as_their_probabilities_say(run: TrainedFolder) -> None:
    """The first token of many answers, against the softmax of the logits over the temperature."""
    answerer = Answerer.of(open_run(run.folder), Sampling(temperature=0.05), 1)
    model = answerer.load()
    ids = answerer.ids(PromptRequest("a"))
    with torch.no_grad():
        wanted = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1] / 0.05, -1)
    answers = answerer.answers(model, [ids] * 2000, 0)
    top = int(wanted.argmax())
    share = answers.count(answerer.tokenizer.decode([top], skip_special_tokens=True)) / len(answers)
    assert 0.05 < float(wanted[top]) < 0.95, "the most likely token is neither certain nor rare, or this shows nothing"
    assert share == pytest.approx(float(wanted[top]), abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "0.9"], "--top-p is 0.9, but without a temperature"),
        (["--seed", "3"], "--seed is 3, but without a temperature"),
        (["--temperature", "-1"], "--temperature is -1.0, but must be 0, which takes"),
        (["--temperature", "nan"], "--temperature is nan, but must"),
        (["--temperature", "1", "--top-p", "0"], "--top-p is 0.0, but must be above 0"),
        (["--temperature", "1", "--top-k", "0"], "--top-k is 0, but must be at least 1"),
        (["--batch-size", "0"], "--batch-size is 0, but must be at least 1"),
        (["--file", "nowhere.jsonl"], "--file is nowhere.jsonl, which cannot be read"),
        (["--max-new-tokens", "257"], "--max-new-tokens is 257, but must be at most 256, the model's context"),
        (["--prompt", "x" * 300], r"a prompt has \d+ tokens, which leave no room for an answer .* context of 256"),
        (["--chat", "--raw"], "--raw is True, but with --chat what is asked is typed"),
        (["--chat"], "--chat is given, but this run was not trained in a chat template"),
    ],
)
def test_options_that_do_not_fit(run: TrainedFolder, options: list[str], message: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
    with pytest.raises(ValueError, match=message):
        command.main([str(run.folder), *options])


def test_a_line_of_a_file_that_cannot_be_used_is_named(run: TrainedFolder, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    for text, message in (("ok\n{bad\n", f"line 2 of {file} begins"), ("\n", f"--file {file} has no lines")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            command.main([str(run.folder), "--file", str(file)])


def test_a_conversation_is_asked_with_all_that_was_said_until_it_is_reset(
    chatting: TrainedFolder, capsys, monkeypatch
) -> None:
    answerer = Answerer.of(open_run(chatting.folder), Sampling(), 8)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nIs </s> it?\nAnd?\n/reset\nAnd?\n" + "x" * 300 + "\n"))
    converse(answerer, "Be brief.")
    shown = capsys.readouterr()
    model, said, answers = answerer.load(), [{"role": "system", "content": "Be brief."}], []
    for text in ("Hi", "And?"):
        said.append({"role": "user", "content": text})
        answers += answerer.answers(model, [answerer.ids(PromptRequest(messages=said))], 0)
        said.append({"role": "assistant", "content": answers[-1]})
    alone = PromptRequest(messages=[said[0], said[3]])
    answers += answerer.answers(model, [answerer.ids(alone)], 0)
    assert shown.out == "".join(f"{answer}\n" for answer in answers)
    assert "a prompt holds the control token '</s>'" in shown.err
    assert "a new conversation" in shown.err
    assert "more than the model's context of 256" in shown.err


def test_the_template_is_read_for_its_ends_once_and_not_with_every_batch(chatting: TrainedFolder, monkeypatch) -> None:
    answerer = Answerer.of(open_run(chatting.folder), Sampling(), 1)
    assert set(answerer.stop) == {answerer.tokenizer.eos_token_id}
    model, prompt = answerer.load(), answerer.ids(PromptRequest(messages=[{"role": "user", "content": "Hi"}]))
    wanted = answerer.answers(model, [prompt], 0)
    monkeypatch.setattr(answering, "stop_tokens", None)
    assert answerer.answers(model, [prompt], 1) == wanted


def test_every_batch_and_turn_draws_numbers_of_its_own() -> None:
    drawn = set()
    for seed in (0, 1):
        for turn in range(3):
            Sampling(temperature=1.0, seed=seed).begin(turn)
            drawn.add(tuple(torch.rand(2).tolist()))
    assert len(drawn) == 6
    Sampling(temperature=1.0, seed=1).begin(2)
    assert tuple(torch.rand(2).tolist()) in drawn


def test_a_line_of_a_file_ends_at_a_line_break_only(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a\u2028b\x0cc\n\x85d\n", encoding="utf-8")
    found = collect_questions(None, None, False, tmp_path / "lines.txt")
    assert [question.text for question in found] == ["a\u2028b\x0cc", "\x85d"]


@pytest.mark.parametrize(
    ("row", "flaw"),
    [
        ({"instruction": "a", "system": "b"}, "has system beside its text, which is not read: give all of it as mess"),
        ({"instruction": "a", "history": [["b", "c"]]}, "has history beside its text"),
        ({"instruction": "a", "context": "b"}, "has context beside its text, which is not read: call it input"),
        ({"instruction": "a", "input": "b", "context": "c"}, "has context beside its text, which is not read: write"),
        ({"prompt": "a", "input": "b"}, "has input beside its text, which is not read: write it into the text"),
        ({"prompt": "a", "tools": [{"name": "f"}]}, "has tools beside its text, which is not read: give all"),
        ({"instruction": "a", "documents": ["b"]}, "has documents beside its text, which is not read: leave it out"),
        ({"instruction": "a", "system_prompt": "b"}, "has system_prompt beside its text, which is not read: give all"),
        (
            {"messages": [{"role": "user", "content": "a"}], "system_prompt": "b"},
            "has system_prompt beside its messages, which is not read: call it system",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "documents": ["b"]},
            "has documents beside its messages, which is not read: leave it out",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "ends with an answer of the assistant",
        ),
    ],
)
def test_what_would_be_lost_of_a_row_is_refused(row: dict, flaw: str) -> None:
    (question,) = read_questions([json.dumps(row)], raw=False)
    assert flaw in question.flaw
