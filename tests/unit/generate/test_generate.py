"""Base and adapter side by side: which prompts are asked, which model answers, and how it is shown."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.tiny_models import load_base
from support.trained_run import TrainedFolder, character_tokenizer, run_export
from transformers import GenerationConfig

from dora_dist.data.encoding.chat import choose_template
from dora_dist.data.encoding.control_tokens import control_tokens
from dora_dist.data.encoding.encoder import EncodingRules
from dora_dist.data.encoding.text import encode_prompts
from dora_dist.data.reading.samples import alpaca_prompt
from dora_dist.data.row_formats import build_encoder
from dora_dist.evaluation.answers import generate_answers
from dora_dist.generate import __main__ as command
from dora_dist.generate import questions as asking
from dora_dist.generate import showing
from dora_dist.generate.conversing import Printed
from dora_dist.runs import records


def shown(prompt: str, base: str, adapted: str) -> str:
    return showing.render(prompt, base, adapted, None) + "\n"


def test_each_answer_comes_from_its_model(run: TrainedFolder, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [alpaca_prompt(text, "a b") for text in ("Say it.", "And this?")]
    tokenizer = character_tokenizer()
    alone = load_base(run.base)
    ids = encode_prompts(tokenizer, prompts)
    base, adapted = (
        [generate_answers(model, tokenizer, [row], 12, [tokenizer.eos_token_id])[0] for row in ids]
        for model in (alone, run.model.eval())
    )
    assert base != adapted, "the adapter changes the answers, or this test shows nothing"
    command.main(
        [str(run.folder), "--prompt", "Say it.", "And this?", "--input", "a b", "--max-new-tokens", "12"],
    )
    expected = "".join(map(shown, prompts, base, adapted))
    assert capsys.readouterr().out == expected


def test_lines_from_standard_input(
    run: TrainedFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("One\n\nTwo\n"))
    command.main([str(run.folder), "--max-new-tokens", "2"])
    output = capsys.readouterr().out
    assert output.count("--- adapter\n") == 2
    assert output.index("One") < output.index("Two")


def collect(lines: str, raw: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    questions = asking.as_asked(trained_on(), asking.collect_questions(None, None, raw), None)
    return [question.prompt(None, chat=False) for question in questions]


def trained_on(prompts=(None,), systems=("",), chat=False, fields=({},), ignore=((),)) -> SimpleNamespace:
    return SimpleNamespace(
        prompts=list(prompts), systems=list(systems), chat=chat, fields=list(fields), ignore=list(ignore)
    )


def asked(
    trained: SimpleNamespace,
    *lines: str,
    system: str | None = None,
    raw: bool = False,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    return asking.as_asked(trained, asking.collect_questions(None, None, raw), system, raw)


def test_the_field_prompt_is_asked_in_the_template_that_the_run_was_trained_in(monkeypatch: pytest.MonkeyPatch) -> None:
    line, tokenizer = json.dumps({"prompt": "Why?", "completion": "So."}), character_tokenizer()
    tokenizer.chat_template = choose_template(tokenizer, "plain").text
    in_chat = trained_on(chat=True, systems=["Be brief."])
    (question,) = asked(in_chat, line, monkeypatch=monkeypatch)
    assert question.conversation() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ]
    (plain,) = asked(trained_on(chat=True), line, monkeypatch=monkeypatch)
    rendered = tokenizer.apply_chat_template(plain.conversation(), tokenize=False, add_generation_prompt=True)
    assert plain.prompt(tokenizer, True) == rendered != "Why?"
    (raw,) = asked(in_chat, line, raw=True, monkeypatch=monkeypatch)
    assert raw.prompt(tokenizer, True) == "Why?"
    (text,) = asked(trained_on(), line, monkeypatch=monkeypatch)
    assert text.prompt(tokenizer, False) == "Why?"


def test_a_run_is_asked_with_the_message_of_the_system_that_it_was_trained_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = {"role": "system", "content": "Be long."}
    lines = ["Why?", json.dumps({"messages": [own, {"role": "user", "content": "Why?"}]})]
    trained = trained_on(systems=["Be brief."], chat=True)
    for system, wanted in ((None, "Be brief."), ("Be kind.", "Be kind.")):
        first, second = asked(trained, *lines, system=system, monkeypatch=monkeypatch)
        assert first.messages == [{"role": "system", "content": wanted}, {"role": "user", "content": "Why?"}]
        assert second.messages[0] == own
    (first, _) = asked(trained, *lines, system="", monkeypatch=monkeypatch)
    assert first.conversation() == [{"role": "user", "content": "Why?"}]
    with pytest.raises(ValueError, match=r"different messages of the system .*--system TEXT"):
        asked(trained_on(systems=["a", "b"], chat=True), "Why?", monkeypatch=monkeypatch)
    with pytest.raises(ValueError, match="--system is 'a', but this run was not trained in a chat template"):
        asked(trained_on(), "Why?", system="a", monkeypatch=monkeypatch)


@pytest.mark.parametrize("chat", [False, True])
def test_a_run_with_a_prompt_of_its_own_is_asked_in_it(chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trained_on(["Summarise:\n{talk.0}"], chat=chat)
    lines = ["A: Hi", json.dumps({"talk": ["A: Hi"], "id": "not asked"}), json.dumps({"prompt": "As it is"})]
    *worded, whole = asked(trained, *lines, monkeypatch=monkeypatch)
    for question in worded:
        if chat:
            assert question.messages == [{"role": "user", "content": "Summarise:\nA: Hi"}]
        else:
            assert question.prompt(None, chat=False) == "Summarise:\nA: Hi"
    if chat:
        assert whole.conversation() == [{"role": "user", "content": "As it is"}]
    else:
        assert whole.prompt(None, chat=False) == "As it is"


def test_a_prompt_of_its_own_reads_what_it_names_of_a_line_and_loses_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = trained_on(["{context}\n{instruction}"])
    row = {"instruction": "Summarise.", "context": "A long passage."}
    (question,) = asked(trained, json.dumps(row), monkeypatch=monkeypatch)
    assert question.prompt(None, chat=False) == "A long passage.\nSummarise."
    line = json.dumps({**row, "system": "Be brief."})
    with pytest.raises(ValueError, match="line 1 of standard input has system, which the prompt of this run does not"):
        asked(trained, line, monkeypatch=monkeypatch)
    (again,) = asked(trained_on(trained.prompts, ignore=[["system"]]), line, monkeypatch=monkeypatch)
    assert again == question
    with pytest.raises(ValueError, match="has context beside its text, which is not read"):
        asked(trained, json.dumps({"prompt": "As it is", "context": "x"}), monkeypatch=monkeypatch)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("fields", "line", "wanted"),
    [
        ({"input": "context", "output": "response"}, {"instruction": "Do", "context": "x", "response": "y"}, "Do\n\nx"),
        ({"input": "context", "output": "response"}, {"instruction": "Do", "input": "x"}, "Do\n\nx"),
        ({"prompt": "data.q", "completion": "a"}, {"data": {"q": "Why?"}}, "Why?"),
        ({"prompt": "context", "completion": "a"}, {"context": "Why?"}, "Why?"),
    ],
    ids=["Dolly", "the format's names", "a path", "a name of other fields"],
)
def test_a_line_may_have_the_names_of_the_runs_own_rows(
    fields: dict, line: dict, wanted: str, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (question,) = asked(trained_on(chat=chat, fields=[fields]), json.dumps(line), monkeypatch=monkeypatch)
    if chat:
        assert question.conversation() == [{"role": "user", "content": wanted}]
    else:
        assert question.prompt(None, False) == (alpaca_prompt("Do", "x") if "instruction" in line else wanted)


def test_messages_of_another_name_are_read_and_what_the_run_ignored_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    talk = [{"role": "user", "content": "Why?"}]
    trained = trained_on(chat=True, fields=[{"messages": "talk", "system": "told"}], ignore=[["context"]])
    line = json.dumps({"talk": talk, "told": "Be brief.", "context": "x"})
    (question,) = asked(trained, line, monkeypatch=monkeypatch)
    assert question.messages == [{"role": "system", "content": "Be brief."}, *talk]
    line = json.dumps({"instruction": "Do", "input": "x", "context": "y"})
    with pytest.raises(ValueError, match="has input beside its text, which is not read: write it into the text"):
        asked(trained_on(fields=[{"input": "context"}]), line, monkeypatch=monkeypatch)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("own", ["Summarise:\n{text}", "{a}\n{b}"])
def test_a_whole_prompt_is_not_put_into_the_prompt_of_the_run(
    own: str, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (question,) = asked(trained_on([own], chat=chat), "All of it", raw=True, monkeypatch=monkeypatch)
    assert (question.raw, question.text, question.messages) == (True, "All of it", ())


def test_a_prompt_of_several_fields_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trained_on(["{text}\n\n{question}"])
    (question,) = asked(trained, json.dumps({"text": "T", "question": 3}), monkeypatch=monkeypatch)
    assert question.prompt(None, chat=False) == "T\n\n3"
    for line in ("What?", json.dumps({"text": "T"})):
        with pytest.raises(ValueError, match=r"give its fields \(question, text\) as JSON"):
            asked(trained, line, monkeypatch=monkeypatch)


def test_sources_with_different_prompts_are_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (question,) = asked(trained_on([None, "{a}"]), "What?", monkeypatch=monkeypatch)
    assert question.prompt(None, chat=False) == alpaca_prompt("What?")
    assert "different prompts: none of them" in capfd.readouterr().err


def test_lines_may_be_json(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": "Do", "input": "x", "output": "ignored"}, {"instruction": "Do", "input": None}]
    lines = "\n".join(json.dumps(row) for row in [*rows, {"prompt": "As it is:"}]) + "\nplain\r\n"
    rendered = [alpaca_prompt("Do", "x"), alpaca_prompt("Do"), "As it is:"]
    assert collect(lines, False, monkeypatch) == [*rendered, alpaca_prompt("plain")]
    assert collect(lines, True, monkeypatch) == [*rendered, "plain"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "standard input has no lines"),
        ("\n  \n", "standard input has no lines"),
        ("fine\n{not json\n", "line 2 of standard input begins with { and cannot be read as JSON"),
        ('{"prompt": "w1", "prompt": "w2"}\n', "the key 'prompt' stands twice in one object"),
        ('{"question": "why"}', "line 1 .*in the field prompt or in the field instruction"),
        ('{"prompt": "a", "instruction": "b"}', "either in the field prompt or"),
        ('{"instruction": 3}', "must have text"),
        ('{"instruction": "b", "input": ["c"]}', "must have text"),
        ('{"messages": [{"role": "user"}]}', "a list of messages, each with role .system, user, assistant, tool. and"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "a list of messages, each with role"),
    ],
)
def test_lines_that_cannot_be_used(lines: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=message):
        collect(lines, False, monkeypatch)


def test_raw_prompts_are_left_alone() -> None:
    raw, rendered = asking.collect_questions([" a\n"], None, True), asking.collect_questions(["a"], "b", False)
    assert [question.prompt(None, chat=False) for question in raw] == [" a\n"]
    assert [question.prompt(None, chat=False) for question in rendered] == [alpaca_prompt("a", "b")]


def test_a_run_on_conversations_is_asked_in_its_chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = choose_template(tokenizer, "plain").text
    conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "And?"},
    ]
    lines = ["Do it", json.dumps({"instruction": "Do", "input": "x"}), json.dumps({"messages": conversation})]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    questions = list(asking.collect_questions(None, None, False))
    end = "\n\n### Response:\n"
    assert [question.prompt(tokenizer, chat=True) for question in questions] == [
        f"<s>### Instruction:\nDo it{end}",
        f"<s>### Instruction:\nDo\n\nx{end}",
        f"<s>### Instruction:\nHi{end}Ho</s>\n### Instruction:\nAnd?{end}",
    ]
    assert questions[0].ids(tokenizer, True, control_tokens(tokenizer)).count(tokenizer.bos_token_id) == 1
    with pytest.raises(ValueError, match="not trained in a chat template"):
        questions[2].prompt(tokenizer, chat=False)


CALLING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}"
    "<s>{{ message.role }}:{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    "[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
"""A template with calls of tools, whose arguments are objects."""
WEATHER = {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}


def prompt_in_training(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    rules = EncodingRules(format="messages", as_chat=True, template=tokenizer.chat_template, train_on="last")
    answered = {**row, "messages": [*row["messages"], {"role": "assistant", "content": "I"}]}
    trained = build_encoder(tokenizer, rules)(
        {"place": [""], "json": [json.dumps(answered)], "flaw": [""], "filled": [False]}
    )
    assert trained["input_ids"], trained["flaw"]
    prompt: list[int] = trained["input_ids"][0][: trained["answer_start"][0]]
    return prompt


def test_content_in_parts_is_joined_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = choose_template(tokenizer, "plain").text
    parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "is it?"}]
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": parts[:1]}]}
    row["messages"].append({"role": "user", "content": parts})
    (question,) = asked(trained_on(chat=True), json.dumps(row), monkeypatch=monkeypatch)
    prompt = prompt_in_training(tokenizer, row)
    assert question.ids(tokenizer, True, control_tokens(tokenizer)) == prompt
    assert "Who\nis it?" in tokenizer.decode(prompt)


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'], ids=["object", "JSON text"])
def test_calls_of_tools_are_rendered_as_in_training(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CALLING
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "20 degrees"},
    ]
    row = {"messages": messages, "tools": [{"type": "function", "function": WEATHER}], "system": "Be brief."}
    (question,) = asked(trained_on(chat=True), json.dumps(row), monkeypatch=monkeypatch)
    assert question.ids(tokenizer, True, control_tokens(tokenizer)) == prompt_in_training(tokenizer, row)
    text = question.prompt(tokenizer, True)
    assert '[weather {"city": "Paris"}]' in text
    assert "Be brief." in text
    tokenizer.chat_template = choose_template(tokenizer, "plain").text
    with pytest.raises(ValueError, match="line 1 of standard input: field 'messages' holds calls of tools: this"):
        question.prompt(tokenizer, True)


def test_messages_that_training_refuses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    line = json.dumps({"messages": [{"role": "user", "content": parts}]})
    with pytest.raises(ValueError, match=r"line 1 of .*field 'messages\[0\].content\[1\]' must be a part of text"):
        asked(trained_on(chat=True), line, monkeypatch=monkeypatch)


def test_a_whole_prompt_that_begins_with_the_start_token_has_one_as_in_training() -> None:
    tokenizer = byte_tokenizer("mistral")
    line = json.dumps({"prompt": "<s>[INST] Hi [/INST]", "completion": "Hello"})
    rules = EncodingRules(format="prompt_completion")
    trained = build_encoder(tokenizer, rules)({"place": [""], "json": [line], "flaw": [""], "filled": [False]})
    asked = asking.PromptRequest("<s>[INST] Hi [/INST]", raw=True).ids(tokenizer, False, control_tokens(tokenizer))
    assert asked == trained["input_ids"][0][: trained["answer_start"][0]]
    assert asked.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("chat", [True, False], ids=["in the template", "plain"])
@pytest.mark.parametrize("row", [{"instruction": "What is </s>?", "input": "<s>"}, {"prompt": "What is </s>?"}])
def test_control_tokens_in_a_question_are_what_they_were_in_training(row: dict[str, str], chat: bool) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = choose_template(tokenizer, "plain").text
    (question,) = asking.read_questions([json.dumps(row)], raw=False)
    as_chat = chat and not question.raw
    rules = EncodingRules(
        format="prompt_completion" if question.raw else "alpaca",
        as_chat=as_chat,
        template=tokenizer.chat_template if as_chat else None,
        control_tokens="text",
    )
    line = json.dumps({**row, "completion": "a", "output": "a"})
    trained = build_encoder(tokenizer, rules)({"place": [""], "json": [line], "flaw": [""], "filled": [False]})
    prompt = trained["input_ids"][0][: trained["answer_start"][0]]
    assert question.ids(tokenizer, chat, control_tokens(tokenizer, "text")) == prompt
    assert prompt.count(tokenizer.eos_token_id) == 0, "the answer has the first one"
    refusing = control_tokens(tokenizer)
    if question.raw:
        assert question.ids(tokenizer, chat, refusing).count(tokenizer.eos_token_id) == 1
    else:
        with pytest.raises(ValueError, match=r"a prompt holds the control token '</s>', .*leave it out, or give the"):
            question.ids(tokenizer, chat, refusing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0, but must be at least 1"),
        (["--prompt", "a", " "], "--prompt number 2 is ' ', but must have some text"),
        (["--input", "x"], "--input is 'x', but it belongs to the instructions of --prompt"),
        (["--prompt", "a", "--input", "x", "--raw"], "leave out --raw"),
        (["--prompt", "What is </s>?"], "a prompt holds the control token '</s>', which would be no text"),
        (["--prompt", "a", "--checkpoint", "checkpoint-9"], r"--checkpoint is 'checkpoint-9'.*there are: none yet"),
    ],
)
def test_options_that_do_not_fit(run: TrainedFolder, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.main([str(run.folder), *options])


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is neither the folder of a run .* nor that of an adapter"):
        command.main([str(tmp_path), "--prompt", "a"])


@pytest.mark.parametrize("trained_on", ["prompt_completion", "text"])
def test_run_trained_on_texts_as_they_are(
    run: TrainedFolder, capsys: pytest.CaptureFixture[str], trained_on: str
) -> None:
    config = run.folder / records.CONFIG
    text = config.read_text()
    config.write_text(text.replace("format: auto", f"format: {trained_on}"))
    try:
        command.main([str(run.folder), "--prompt", "a", "--max-new-tokens", "1"])
    finally:
        config.write_text(text)
    assert f"(format {trained_on}): --raw gives" in capsys.readouterr().err


def test_side_by_side_in_a_wide_terminal() -> None:
    base = "the base has much to say about this matter and goes on and on\n\nand ends"
    text = showing.render("The prompt", base, "short", 80)
    lines = text.split("\n")
    assert max(map(len, lines)) == 80
    assert lines[:2] == ["The prompt", ""]
    left, right = zip(*(line.split(" | ") for line in lines[2:5]), strict=True)
    assert [cell.rstrip() for cell in left] == ["base", "-" * 38, "the base has much to say about this"]
    assert right == ("adapter", "-" * 38, "short")
    assert "and ends" in text


def test_one_below_the_other_where_it_is_narrow() -> None:
    expected = "--- prompt\np\n--- base\nx  y\n--- adapter\nz\\x1b\\x07\n"
    assert showing.render("p\n", " x  y ", "z\x1b\x07", 79) == expected
    assert showing.render("p\n", " x  y ", "z\x1b\x07", None) == expected


@pytest.mark.parametrize("width", [None, 80])
@pytest.mark.parametrize(
    "text",
    [
        *("東京\u3000大阪", "👩\u200d💻", "می\u200cکنم", "10\u202f000\u00a0€", "if x:\n    y"),
        *("\u200fשמש!\u200f", "C++\u200e تعلم", "\u061c5%", "Donau\u00addampf"),
    ],
)
def test_answers_in_any_script_are_shown_as_they_are(text: str, width: int | None, capsys) -> None:
    shown = showing.render("p", text, text.replace("    ", "\t"), width)
    assert all(shown.count(line) == 2 for line in text.split("\n"))
    Printed(character_tokenizer()).on_finalized_text(text, stream_end=True)
    assert capsys.readouterr().out == f"{text}\n"


def test_a_crlf_is_a_line_break_and_what_would_reorder_a_line_is_escaped(capsys) -> None:
    assert showing.render("p", "a\r\nb\r", "\u202ec\u2066", None) == (
        "--- prompt\np\n--- base\na\nb\\r\n--- adapter\n\\u202ec\\u2066\n"
    )
    streamer = Printed(byte_tokenizer("chatml"))
    streamer.put(streamer.tokenizer("a\r\nb", return_tensors="pt")["input_ids"])
    streamer.end()
    assert capsys.readouterr().out == "a\nb\n"


def test_width_is_that_of_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "132")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert showing.terminal_width() is None
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert showing.terminal_width() == 132


@pytest.mark.parametrize("module", ["generate.__main__", "export.__main__"])
def test_help_does_not_wait_for_torch(module: str) -> None:
    program = (
        f"import sys; from dora_dist.{module} import build_parser\nprint(build_parser().format_help())\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert f"usage: dora-dist {module.removesuffix('.__main__')}" in done.stdout
    assert "checkpoint-120" in done.stdout


def test_penalties_and_lengths_that_the_base_has_set_change_no_answer(run: TrainedFolder, tmp_path: Path, capsys):
    """Which would not be the most likely tokens; a merged export has them as the base has."""
    options = ("--prompt", "aaaa", "--max-new-tokens", "16", "--model.path", str(tmp_path / "base"))
    base = Path(shutil.copytree(run.base, tmp_path / "base"))
    command.main([str(run.folder), *options])
    wanted = capsys.readouterr().out
    settings = GenerationConfig.from_pretrained(base)
    settings.update(repetition_penalty=1.5, no_repeat_ngram_size=1, suppress_tokens=list(range(50)), min_length=40)
    settings.save_pretrained(base)
    command.main([str(run.folder), *options])
    assert capsys.readouterr().out == wanted
    output = run_export(run, tmp_path / "out", "--format", "merged", "--model.path", str(base))
    merged = GenerationConfig.from_pretrained(output)
    assert (merged.repetition_penalty, merged.no_repeat_ngram_size, merged.min_length) == (1.5, 1, 40)
